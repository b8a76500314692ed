"""Error of every Triton attention and patch embedding case against float64, beside stock PyTorch's in the same dtype.

On a GPU at ViT-B/16's length; without one in Triton's interpreter, at a length that takes minutes. Stock is SDPA,
F.layer_norm and F.conv2d. Fails where a gate of fastvit.testing is missed, and says how many rows are above stock.

    python benchmarks/accuracy.py [--only TEXT] [--tokens 197] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastvit import ops  # noqa: E402
from fastvit.dispatch import use_backend  # noqa: E402
from fastvit.parity import machine  # noqa: E402
from fastvit.reference import HeadNorm, Rope  # noqa: E402
from fastvit.testing import accuracy, cast_inputs, run_with_gradients  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[Callable[..., Tensor], dict[str, Any]]


def attention_cases(tokens: int, dim: int, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Every form that has a kernel, at one head dim."""
    rows = {name: _draw(2, 2, tokens, dim, dtype=dtype) for name in "qkv"}
    keys = torch.arange(tokens, device=DEVICE) < torch.tensor([tokens, tokens // 2], device=DEVICE).view(2, 1, 1, 1)
    norms = {f"{name}_{part}": _draw(dim, dtype=dtype, shift=part == "weight") for name in "qk" for part in _PARTS}
    angles = _draw(tokens - 1, dim, dtype=torch.float32).detach()
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    yield "plain", (ops.attention, rows)
    yield "class token", (ops.attention, rows | {"q": rows["q"].detach()[:, :, :1].requires_grad_()})
    yield "causal", (functools.partial(ops.attention, is_causal=True), rows)
    yield "key padding", (functools.partial(ops.attention, attn_mask=keys), rows)
    bias = _draw(1, 2, tokens, tokens, dtype=dtype).detach()
    yield "additive mask", (functools.partial(_masked, bias=bias), rows)
    # unrotated, a bias on every key moves all scores of a query alike: its gradient is zero, and its error all noise
    unbiased = {name: value for name, value in norms.items() if name != "k_bias"}
    yield "norms", (functools.partial(_prepared, k_bias=None, rope=None), rows | unbiased)
    yield "norms and rope (half)", (functools.partial(_prepared, rope=Rope(table, 1, True)), rows | norms)
    yield "norms and rope (interleaved)", (functools.partial(_prepared, rope=Rope(table, 1)), rows | norms)
    packed = {"qkv": _draw(2, tokens, 3 * 2 * dim, dtype=dtype)}
    yield "packed", (functools.partial(ops.attention_packed, num_heads=2), packed)
    ragged = {name: _draw(tokens + tokens // 2, 2, dim, dtype=dtype) for name in "qkv"}
    bounds = torch.tensor([0, tokens, tokens + tokens // 2], device=DEVICE)
    yield "ragged", (functools.partial(ops.attention_varlen, cu_seqlens=bounds, max_seqlen=tokens), ragged)


def patch_cases(side: int, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    weight = {"weight": _draw(64, 3, 16, 16, dtype=dtype, scale=768**-0.5), "bias": _draw(64, dtype=dtype, scale=0.1)}
    patches = (side // 16) ** 2
    tables = {"pos_embed": _draw(patches + 1, 64, dtype=dtype), "prefix": _draw(1, 64, dtype=dtype)}
    yield "patches", (ops.patch_embed, {"images": _draw(2, 3, side, side, dtype=dtype)} | weight | tables)
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, device=DEVICE)
    statistics = {"mean": torch.tensor([0.48, 0.46, 0.41], device=DEVICE), "std": torch.full((3,), 0.23, device=DEVICE)}
    yield "patches of uint8", (functools.partial(ops.patch_embed, pixels, **statistics), weight | tables)


_PARTS = ("weight", "bias")


def _draw(*size: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(size) * scale + shift).to(DEVICE, dtype).requires_grad_()


def _masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ops.attention(q, k, v, attn_mask=bias.to(q.dtype))


def _prepared(q, k, v, q_weight, q_bias, k_weight, k_bias, rope: Rope | None) -> Tensor:
    if rope is not None and q.dtype == torch.float64:
        rope = rope._replace(table=rope.table.double())
    return ops.attention(q, k, v, q_norm=HeadNorm(q_weight, q_bias), k_norm=HeadNorm(k_weight, k_bias), rope=rope)


def measure(fn: Callable[..., Tensor], inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for the output and for the gradient of every input."""
    with torch.no_grad(), use_backend("torch"):
        size = fn(**inputs)
    dout = torch.randn(size.shape, generator=torch.Generator().manual_seed(1)).to(size)
    results = []
    for backend, tensors in (("triton", inputs), ("torch", inputs), ("reference", cast_inputs(inputs, torch.float64))):
        with use_backend(backend):
            results.append(run_with_gradients(fn, tensors, dout))
    for name, value in results[0].items():
        found = accuracy(value, results[1][name], results[2][name])
        yield {
            "tensor": name,
            "max_error": found.max_error,
            "max_error_stock": found.max_error_eager,
            "rms_error": found.rms_error,
            "rms_error_stock": found.rms_error_eager,
            "passed": found.passed,
        }


def rows(tokens: int, only: str) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        torch.manual_seed(0)
        found = [(f"{name}, D = {dim}", case) for dim in (64, 80) for name, case in attention_cases(tokens, dim, dtype)]
        found += patch_cases(224 if CUDA else 64, dtype)
        for name, (fn, inputs) in found:
            if only in name:
                label = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
                yield from (label | row for row in measure(fn, inputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tokens", type=int, default=197 if CUDA else 33)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    found = []
    print(f"{'case':<38} {'dtype':<9} {'tensor':<14} {'rms':>9} {'stock':>9} {'ratio':>6} {'max':>9} {'stock':>9}")
    for row in rows(args.tokens, args.only):
        found.append(row)
        rms, stock = row["rms_error"], row["rms_error_stock"]
        print(
            f"{row['case']:<38} {row['dtype']:<9} {row['tensor']:<14} {rms:9.2e} {stock:9.2e}"
            f" {rms / stock if stock else float('nan'):6.2f} {row['max_error']:9.2e} {row['max_error_stock']:9.2e}"
            + ("" if row["passed"] else "  MISSED"),
            flush=True,
        )
    above = sum(row["rms_error"] > row["rms_error_stock"] for row in found)
    failed = sum(not row["passed"] for row in found)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(DEVICE), "passed": not failed, "rows": found}, indent=1) + "\n"
        )
    print(f"{len(found) - above} rows at or below stock, {above} above; {len(found) - failed} passed, {failed} failed")
    return int(failed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
