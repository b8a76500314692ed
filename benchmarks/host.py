"""Microseconds that the host spends on a block, beside eager PyTorch's: what batch 1 without a graph is bound by.

python benchmarks/host.py [--profile NAME] [--json FILE]

Needs no GPU: tensors are tiny and lie on the CPU, on one thread. ``eager`` and ``cpp`` run for real. ``cuda`` is the
way a call takes on a Hopper GPU, by the real Python and the real glue of csrc/cuda (host_glue.py; needs nvcc): checks,
allocations, PyTorch's dispatcher. Not in it: what CUDA's runtime does for a launch, and Triton's launcher where the
launch is not C++'s. Eager's calls on a GPU likewise cost more than the tiny ones here. In training ``cuda`` holds seven
products that are PyTorch's: work on a CPU, a launch on a GPU. They have a row of their own. (LayerScale's two have a
float32 result, which a CPU does not have: empty as well.)
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import host_glue
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import block_plan, fused, ops, use_backend
from fastvit.dispatch import OPS
from fastvit.layers import Block
from fastvit.ops import _contract, _cuda, _sm90
from fastvit.parity import machine

WIDTH, HEADS, TOKENS = 64, 1, 5
ROUNDS, CALLS = 200, 10


class EagerBlock(nn.Module):
    """timm's block, written with as few calls as it takes."""

    def __init__(self, block: Block):
        super().__init__()
        self.norm1, self.norm2, self.act, self.heads = block.norm1, block.norm2, block.mlp.act, block.attn.num_heads
        self.qkv, self.proj, self.fc1, self.fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        self.after1, self.after2 = (
            nn.Sequential(*(module for module in modules if not isinstance(module, nn.Identity)))
            for modules in ((block.ls1, block.drop_path1), (block.ls2, block.drop_path2))
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self._through(self.after1, self.proj(attended))
        return x + self._through(self.after2, self.fc2(self.act(self.fc1(self.norm2(x)))))

    @staticmethod
    def _through(modules: nn.Sequential, branch: Tensor) -> Tensor:
        """Not by a call of the whole, which a plain block has no use for."""
        for module in modules._modules.values():
            branch = module(branch)  # type: ignore[misc]
        return branch


@contextmanager
def cuda_path() -> Iterator[None]:
    """Send CPU tensors down the way of Hopper's kernels, as far as the launches."""
    from fastvit.kernels import _launch  # type: ignore[attr-defined]

    with ExitStack() as stack:
        for target, name, value in (
            (_contract, "why_not_compiled", lambda *args: []),
            (_contract, "why_not_triton", lambda *args: []),
            (_cuda, "ops", host_glue.ops()),
            (_sm90, "device_facts", lambda index: ((9, 0), 132)),
            (_launch, "current_device", lambda: None),
            (_launch, "current_stream", lambda device: 0),
            (_launch.Launch, "run", lambda launch: Compiled(launch)),
            (_launch, "_kept", {}),
            (block_plan, "_is_on_gpu", lambda x: True),
            (block_plan, "_plans", {}),
            (block_plan.hopper, "_packed", {}),
            *((op, "_settled", {}) for op in OPS.values()),  # a verdict found here does not outlive it
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(use_backend(layernorm_linear="cuda", linear_residual="cuda", layernorm_mlp="cuda"))
        stack.enter_context(use_backend(attention_packed="triton"))
        yield


class Compiled:
    """Stands for what Triton makes of a launch, and its launcher: launched from Python or C++, it does nothing."""

    packed_metadata = (4, 1, 0)
    function = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value
    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launch: Any):
        self.src = SimpleNamespace(signature=launch.aot_case("").signature)
        self.run = self

    def __call__(self, *args: Any) -> None:
        pass


def op_calls(block: Block, x: Tensor, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """name -> (the op, eager's way to the same)"""
    norm, attn, mlp = block.norm1, block.attn, block.mlp
    width = x.shape[-1]
    qkv = torch.randn(*x.shape[:2], 3 * width, dtype=dtype)
    first = (norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias)
    projection = (attn.proj.weight, attn.proj.bias)
    second = (norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)

    def attend() -> Tensor:
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)

    return {
        "layernorm_linear": (lambda: ops.layernorm_linear(x, *first), lambda: attn.qkv(norm(x))),
        "attention_packed": (lambda: ops.attention_packed(qkv, HEADS), attend),
        "linear_residual": (
            lambda: ops.linear_residual(x, *projection, x),
            lambda: x + attn.proj(x),
        ),
        "layernorm_mlp": (
            lambda: ops.layernorm_mlp(x, *second),
            lambda: x + mlp.fc2(mlp.act(mlp.fc1(norm(x)))),
        ),
    }


def least_microseconds(calls: dict[str, Callable]) -> dict[str, float]:
    """The least of many short rounds, taken in turn: other work on the machine only ever adds."""
    least = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(50):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.perf_counter() - begin) / CALLS * 1e6)
    return least


TRAINED = {
    "drop path": {"drop_path": 0.1},
    "layer scale": {"init_values": 0.1},
    "scale and drop path": {"init_values": 0.1, "drop_path": 0.1},
    "norms and biases": {},
}


def trained(name: str, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(ours, eager's), of a block as it is often trained."""
    block = Block(WIDTH, HEADS, qkv_bias=True, dtype=dtype, **TRAINED[name]).train()
    if name == "norms and biases":
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
    x, eager = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True), EagerBlock(block)
    return lambda: block(x), lambda: eager(x)


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """name -> (ours, eager's), of a block and of each op."""
    block = Block(WIDTH, HEADS, qkv_bias=True, dtype=dtype).eval()
    x, eager = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True), EagerBlock(block).eval()
    return {
        "block": (lambda: block(x), lambda: eager(x)),
        "class token": (lambda: fused.class_token_block_forward(block, x), lambda: eager(x)[:, :1]),
    } | op_calls(block, x, dtype)


def rows() -> list[dict[str, object]]:
    """float32 on the CPU, where a 16-bit product would be work and not host time; bfloat16 down the way to a GPU."""
    found: list[dict[str, object]] = []
    wide, half = calls(torch.float32), calls(torch.bfloat16)
    with torch.inference_mode():
        for name, (ours, stock) in wide.items():
            found.append({"op": name, "mode": "infer", **least_microseconds({"cpp": ours, "eager": stock})})
            found[-1] |= on_cuda(half[name][0])
        with mock.patch.object(fused, "run_block", _no_plan):
            by_ops = {name: on_cuda(half[name][0]) for name in ("block", "class token")}
        found += [{"op": f"{name} by ops", "mode": "infer", **row} for name, row in by_ops.items()]
    ours, stock = (training(call) for call in wide["block"])
    found.append({"op": "block", "mode": "train", **least_microseconds({"cpp": ours, "eager": stock})})
    ours = training(half["block"][0])
    found[-1] |= on_cuda(ours)
    with mock.patch.object(fused, "run_block", _no_plan):
        found.append({"op": "block by ops", "mode": "train", **on_cuda(ours)})
    for name in TRAINED:
        ours, stock = (training(call) for call in trained(name, torch.float32))
        found.append({"op": name, "mode": "train", **least_microseconds({"cpp": ours, "eager": stock})})
        found[-1] |= on_cuda(training(trained(name, torch.bfloat16)[0]))
    found.append({"op": "its products", "mode": "train", **on_cuda(products_of_a_backward)})
    return found


def training(call: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients add up, which costs the same on every way."""
    gradient = torch.ones_like(call())
    return lambda: call().backward(gradient)


@torch.no_grad()
def products_of_a_backward() -> None:
    """The seven that are PyTorch's on a GPU too, where they are launches: here they are work, and in every row."""
    for rows, cols in ((_HALVES[0], _HALVES[1]), (_HALVES[1], _HALVES[0]), (_HALVES[0], _HALVES[0])):
        torch.matmul(rows.t(), cols)
    torch.matmul(_HALVES[2].t(), _HALVES[0])
    torch.matmul(_HALVES[1], _WEIGHTS[0])
    torch.matmul(_HALVES[0], _WEIGHTS[1])
    torch.matmul(_HALVES[2], _WEIGHTS[2])


_HALVES = [torch.randn(TOKENS, cols, dtype=torch.bfloat16) for cols in (WIDTH, 4 * WIDTH, 3 * WIDTH)]
_WEIGHTS = [torch.randn(rows, WIDTH, dtype=torch.bfloat16) for rows in (4 * WIDTH, WIDTH, 3 * WIDTH)]


def _no_plan(*args: Any, **options: Any) -> None:
    pass


def on_cuda(call: Callable) -> dict[str, float]:
    if host_glue.why_not():
        return {}
    with cuda_path():
        return least_microseconds({"cuda": call})


def profile(name: str) -> None:
    """Where the host's time goes on the way of the CUDA kernels."""
    call = calls(torch.bfloat16)[name][0]
    profiler = cProfile.Profile()
    with torch.inference_mode(), cuda_path():
        call()
        profiler.enable()
        for _ in range(2000):
            call()
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", metavar="NAME", help="an op, or block: where its time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.profile:
        return profile(arguments.profile)
    found = rows()
    if arguments.json:
        result = {"machine": machine("cpu"), "kind": "host", "unit": "us", "rows": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'us':<20}{'mode':<8}{'eager':>8}{'cpp':>8}{'cuda':>8}")
    for row in found:
        numbers = "".join(f"{row[name]:8.1f}" if name in row else f"{'-':>8}" for name in ("eager", "cpp", "cuda"))
        print(f"{row['op']:<20}{row['mode']:<8}{numbers}")


if __name__ == "__main__":
    main()
