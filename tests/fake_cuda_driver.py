"""Run by test_launch_driver.py in a process of its own: what reaches the driver at a shape's first call, and after.

Triton compiles for sm_90 and launches through its own launcher; libcuda.so.1 is the recorder of fake_cuda_driver.c.
Prints one JSON object: for each case three calls, each a list of launches; pointers by the name of their tensor. What a
block's inference launches has a fourth, by C++ (launch_compiled.cpp).
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from typing import Any

RECORDER = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before Triton looks for a libcuda.so.1
BY_CPP = ctypes.CDLL(sys.argv[2])

import torch  # noqa: E402
import triton  # noqa: E402
from fastvit.kernels._options import Options  # noqa: E402
from fastvit.kernels._qk import Preparation  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils  # noqa: E402

from fastvit.kernels import _launch, attention, attention_few, attention_general, patch_embed  # noqa: E402

STREAM, SCALE = 7, 0.125
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "*": "Q"}


class Record(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)]
    _fields_ += [("bytes", ctypes.c_uint), ("stream", ctypes.c_ulonglong), ("function", ctypes.c_ulonglong)]
    _fields_ += [("parameters", ctypes.c_ubyte * 1024)]


class Launcher(CudaLauncher):
    """Triton's own; it tells the recorder the sizes of the parameters first."""

    def __init__(self, src: Any, metadata: Any) -> None:
        super().__init__(src, metadata)
        self.formats = formats_of(src)

    def __call__(self, *args: Any) -> None:
        expect(self.formats)
        super().__call__(*args)
        LAUNCHES.append((self.formats, last_record()))


def formats_of(src: Any) -> list[str]:
    kinds = [kind for kind in src.signature.values() if kind != "constexpr"]
    return [FORMATS["*" if kind[0] == "*" else kind] for kind in kinds] + ["Q", "Q"]  # and scratch areas


def expect(formats: list[str]) -> None:
    """Tell the recorder the parameters of the next launch."""
    ctypes.c_int.in_dll(RECORDER, "fake_count").value = len(formats)
    sizes = (ctypes.c_int * 128).in_dll(RECORDER, "fake_sizes")
    sizes[: len(formats)] = [struct.calcsize(code) for code in formats]


class Driver(CudaDriver):
    """A Hopper GPU that nobody has."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), Launcher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device=0: STREAM
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None


RUN = triton.JITFunction.run


def never_again(self: Any, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"{self} was launched by Triton at a later call of the same shape")


LAUNCHES: list[tuple[list[str], Record]] = []


def last_record() -> Record:
    number = ctypes.c_int.in_dll(RECORDER, "fake_launches").value - 1
    record = (Record * 16).in_dll(RECORDER, "fake_records")[number % 16]
    return Record.from_buffer_copy(record)


def described(names: dict[int, str]) -> list[dict[str, Any]]:
    """The launches since the last time; an address that has no name is numbered in the order it comes."""
    found, unknown = [], {}
    for formats, record in LAUNCHES:
        values = list(struct.unpack("=" + "".join(formats), bytes(record.parameters[: record.bytes])))
        for i, code in enumerate(formats):
            if code == "Q" and values[i]:
                values[i] = names.get(values[i]) or unknown.setdefault(values[i], f"unknown {len(unknown)}")
        found.append({key: list(getattr(record, key)) for key in ("grid", "block")})
        found[-1] |= {key: getattr(record, key) for key in ("shared", "stream", "function")} | {"parameters": values}
    LAUNCHES.clear()
    return found


def zeros(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def heads_of(tokens: int, dim: int) -> dict[str, Tensor]:
    """Views of a packed projection."""
    views = zeros(2, tokens, 3, 3, dim).permute(2, 0, 3, 1, 4).unbind(0)
    return dict(zip("qkv", views, strict=True))


def plain(tokens: int, dim: int, queries: int | None = None) -> dict[str, Tensor]:
    """Forward and backward."""
    module = attention_few if queries else attention
    forward, backward = (getattr(module, f"{module.__name__.rpartition('.')[2]}_{way}") for way in ("fwd", "bwd"))
    given = heads_of(tokens, dim)
    given["q"] = given["q"][:, :, :queries]
    out, lse = forward(*given.values(), SCALE)
    grads = {f"d{name}": torch.empty_like(t) for name, t in given.items()}
    dout = torch.zeros_like(out)
    backward(dout, *given.values(), out, lse, SCALE, *grads.values())
    return given | grads | {"out": out, "lse": lse, "dout": dout}


def packed(tokens: int, dim: int) -> dict[str, Tensor]:
    qkv = zeros(2, tokens, 9 * dim)
    out, lse = attention.attention_packed_fwd(qkv, 3, SCALE)
    q, k, v = qkv.unflatten(-1, (3, 3, dim)).unbind(2)
    return {"q": q, "k": k, "v": v, "out": out, "lse": lse}


def few(tokens: int, dim: int) -> dict[str, Tensor]:
    """The class token's forward, as a block has it."""
    given = class_token_heads(tokens, dim)
    out, lse = attention_few.attention_few_fwd(*given.values(), SCALE)
    return given | {"out": out, "lse": lse}


def class_token_heads(tokens: int, dim: int) -> dict[str, Tensor]:
    kv = zeros(2, tokens, 2, 3, dim)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    return {"q": zeros(2, 1, 3, dim).transpose(1, 2), "k": k, "v": v}


def packed_by_cpp(tokens: int, dim: int) -> dict[str, Tensor]:
    """What ``packed`` launched before."""
    qkv = zeros(2, tokens, 9 * dim)
    out, lse = zeros(2, tokens, 3 * dim), zeros(2, 3, tokens, dtype=torch.float32)
    q, k, v = qkv.unflatten(-1, (3, 3, dim)).unbind(2)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    return launch_by_cpp(attention.made_packed_fwd(qkv, 3, SCALE), given)


def few_by_cpp(tokens: int, dim: int) -> dict[str, Tensor]:
    """What ``few`` launched before."""
    given = class_token_heads(tokens, dim)
    replay = attention_few.made_few_fwd(*given.values(), SCALE)
    return launch_by_cpp(replay, given | {"out": zeros(2, 1, 3, dim), "lse": zeros(2, 3, 1, dtype=torch.float32)})


def launch_by_cpp(replay: _launch.Replay | None, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As csrc/cuda/sm90/block.cpp does."""
    assert replay is not None
    assert replay.is_packable()
    formats = formats_of(replay.compiled.src)
    expect(formats)
    pointers = (ctypes.c_void_p * len(given))(*(t.data_ptr() for t in given.values()))
    assert BY_CPP.launch_compiled(replay.packed(), pointers, ctypes.c_void_p(STREAM)) == 0
    LAUNCHES.append((formats, last_record()))
    return given


def general(**options: Any) -> dict[str, Tensor]:
    """Forward. ``options`` are makers of tensors, and numbers."""
    made = {name: value() if callable(value) else value for name, value in options.items()}
    given = {name: t[:1] for name, t in heads_of(60, 64).items()}
    out, top, log = attention_general.attention_general_fwd(*given.values(), Options(SCALE, **made))
    names = {"attn_mask": "mask", "dropout_seed": "seed", "cu_seqlens": "cu"}
    tensors = {names[name]: value for name, value in made.items() if name in names}
    if "preparation" in made:
        prepared = made["preparation"]
        tensors |= {"qw": prepared.q_weight, "kw": prepared.k_weight, "rope": prepared.rope}
    return given | tensors | {"out": out, "top": top, "log": log}


def prepared() -> Preparation:
    weights = {name: zeros(64) for name in ("q_weight", "k_weight")}
    return Preparation(**weights, norm="rms", rope=zeros(59, 128, dtype=torch.float32), num_prefix=1, half=True)


def embedded(channels_last: bool, **optional: tuple[int, ...]) -> dict[str, Tensor]:
    images, weight = zeros(2, 3, 32, 32, dtype=torch.uint8), zeros(24, 3, 16, 16)
    weight = weight.contiguous(memory_format=torch.channels_last) if channels_last else weight
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    found = {name: zeros(*size, dtype=torch.float32) for name, size in optional.items()}
    given = [found.get(name) for name in ("bias", "pos", "prefix", "mean", "std")]
    tokens = patch_embed.patch_embed_fwd(images, weight, *given)
    return {"images": images, "weight": weight, "tokens": tokens, **found}


CASES = {
    "short": lambda: plain(197, 64),
    "streaming": lambda: plain(261, 80),
    "few": lambda: plain(50, 64, queries=1),
    "few_forward": lambda: few(197, 64),
    "packed_short": lambda: packed(197, 64),
    "packed_streaming": lambda: packed(261, 80),
    "mask": lambda: general(attn_mask=lambda: zeros(1, 1, 60, 60, dtype=torch.bool)),
    "causal_dropout": lambda: general(is_causal=True, dropout_p=0.1, dropout_seed=lambda: zeros(1, dtype=torch.int64)),
    "varlen": lambda: general(cu_seqlens=lambda: torch.tensor([0, 20, 60], dtype=torch.int32), max_seqlen=40),
    "prepared": lambda: general(preparation=prepared),
    "patch_embed": lambda: embedded(False, bias=(24,), pos=(5, 24), prefix=(1, 24), mean=(3,), std=(3,)),
    "patch_embed_channels_last": lambda: embedded(True),
}


CASES_BY_CPP = {
    "packed_short": lambda: packed_by_cpp(197, 64),
    "packed_streaming": lambda: packed_by_cpp(261, 80),
    "few_forward": lambda: few_by_cpp(197, 64),
}


def calls(name: str) -> list[list[dict[str, Any]]]:
    """Three calls on fresh tensors of one shape, and C++'s."""
    found, kept = [], []  # kept, so that no address comes back
    made = [CASES[name]] * 3 + [case for known, case in CASES_BY_CPP.items() if known == name]
    for number, case in enumerate(made):
        triton.JITFunction.run = never_again if number else RUN
        kept.append(case())
        found.append(described({t.data_ptr(): name for name, t in kept[-1].items()}))
    triton.JITFunction.run = RUN
    return found


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    _launch.current_device, _launch.current_stream = lambda: None, lambda device: STREAM  # the tensors are on the CPU
    json.dump({name: calls(name) for name in CASES}, sys.stdout)


if __name__ == "__main__":
    main()
