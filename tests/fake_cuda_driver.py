"""Run by test_launch_driver.py in a process of its own: what reaches the driver at a shape's first call, and after.

Triton compiles for sm_90 and launches through its own launcher; libcuda.so.1 is the recorder of fake_cuda_driver.c.
Prints one JSON object: for each pass a list of calls, each a list of launches; pointers by the name of their tensor.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from typing import Any

RECORDER = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before Triton looks for a libcuda.so.1

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils  # noqa: E402

from fastvit.kernels import _launch, attention  # noqa: E402

STREAM = 7
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "*": "Q"}


class Record(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)]
    _fields_ += [("bytes", ctypes.c_uint), ("stream", ctypes.c_ulonglong), ("function", ctypes.c_ulonglong)]
    _fields_ += [("parameters", ctypes.c_ubyte * 1024)]


class Launcher(CudaLauncher):
    """Triton's own; it tells the recorder the sizes of the parameters first."""

    def __init__(self, src: Any, metadata: Any) -> None:
        super().__init__(src, metadata)
        kinds = [kind for kind in src.signature.values() if kind != "constexpr"]
        self.formats = [FORMATS["*" if kind[0] == "*" else kind] for kind in kinds] + ["Q", "Q"]  # and scratch areas

    def __call__(self, *args: Any) -> None:
        ctypes.c_int.in_dll(RECORDER, "fake_count").value = len(self.formats)
        sizes = (ctypes.c_int * 128).in_dll(RECORDER, "fake_sizes")
        sizes[: len(self.formats)] = [struct.calcsize(code) for code in self.formats]
        super().__call__(*args)
        LAUNCHES.append((self.formats, last_record()))


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


def calls(tokens: int, dim: int) -> dict[str, list]:
    """Three calls of each pass on fresh tensors of one shape."""
    batch, heads, scale = 2, 3, 0.125
    found: dict[str, list] = {"packed": [], "fwd": [], "bwd": []}
    kept = []  # no address comes back
    for number in range(3):
        triton.JITFunction.run = never_again if number else RUN
        qkv, grads = (torch.zeros(batch, tokens, 3 * heads * dim, dtype=torch.bfloat16) for _ in range(2))
        (q, k, v), (dq, dk, dv) = (
            t.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4).unbind(0) for t in (qkv, grads)
        )
        out, lse = attention.attention_packed_fwd(qkv, heads, scale)
        inputs = {q.data_ptr(): "q", k.data_ptr(): "k", v.data_ptr(): "v"}
        found["packed"].append(described(inputs | {out.data_ptr(): "out", lse.data_ptr(): "lse"}))
        kept += [qkv, grads, out, lse]
        out, lse = attention.attention_fwd(q, k, v, scale)
        results = {out.data_ptr(): "out", lse.data_ptr(): "lse"}
        found["fwd"].append(described(inputs | results))
        dout = torch.zeros_like(out)
        attention.attention_bwd(dout, q, k, v, out, lse, scale, dq, dk, dv)
        gradients = {dq.data_ptr(): "dq", dk.data_ptr(): "dk", dv.data_ptr(): "dv", dout.data_ptr(): "dout"}
        found["bwd"].append(described(inputs | results | gradients))
        kept += [out, lse, dout]
    return found


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    _launch.current_device, _launch.current_stream = lambda: None, lambda device: STREAM  # the tensors are on the CPU
    sizes = {"short": (197, 64), "streaming": (261, 80)}
    json.dump({name: calls(*size) for name, size in sizes.items()}, sys.stdout)


if __name__ == "__main__":
    main()
