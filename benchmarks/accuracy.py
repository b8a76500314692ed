"""Error of every Triton attention and patch embedding case against float64, beside stock PyTorch's in the same dtype.

Stock is SDPA, F.layer_norm and F.conv2d. Every form runs at all lengths for D = 64 and at all head dims for N = 197,
plain attention and the class token's row at all pairs; on a GPU, and with --full, everything runs at all pairs. Without
a GPU the kernels run in Triton's interpreter with few heads, with the tiles of an H200: twenty minutes on two cores; a
few with --quick and more than an hour with --full are estimates. Its matrix products are summed in float64 and rounded
once, so float32 rows are milder than a GPU's; rounding of inputs, weights and results is the kernels' own.

Fails where a gate of fastvit.testing is missed, and says how many rows are above stock.

    python benchmarks/accuracy.py [--quick | --full] [--only TEXT] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

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
LENGTHS, DIMS = (1, 50, 65, 197, 257, 577), (32, 64, 72, 80, 96, 128)
SCORES = ("grad_q", "grad_k", "grad_q_weight", "grad_q_bias", "grad_k_weight", "grad_k_bias")
NOISE = 1e-5  # largest gradient through the scores of a query with one key, which has none
HOW = "in Triton's interpreter: float32 products are summed in float64, milder than a GPU's" if not CUDA else "on a GPU"
HEAD = "| case | dtype | tensor | rows | RMS, median | RMS, worst | at | maximum, worst | above stock |"
Case = tuple[Callable[..., Tensor], dict[str, Any]]


class Cell(NamedTuple):
    """One case to run: a form at one length and head dim, or a patch embedding at one image side and width."""

    form: str
    dtype: torch.dtype
    tokens: int
    dim: int

    @property
    def name(self) -> str:
        if self.form in PATCHES:
            return f"{self.form}, side {self.tokens}, width {self.dim}"
        return f"{self.form}, N = {self.tokens}, D = {self.dim}"


def cells(quick: bool, full: bool) -> list[Cell]:
    """Longest first, so that no process ends alone."""
    found = []
    for form in FORMS:
        for tokens in LENGTHS:
            for dim in DIMS:
                all_pairs = full or (not quick and form in ("plain", "class token"))
                if all_pairs or (dim == 64 and tokens <= (65 if quick else 577)) or tokens == (50 if quick else 197):
                    found.append((form, tokens, dim))
    found += [(form, side, dim) for form in PATCHES for side, dim in ((64, 192), (112, 384))[: 1 if quick else 2]]
    made = [Cell(form, dtype, tokens, dim) for form, tokens, dim in found for dtype in DTYPES]
    return sorted(made, key=lambda cell: -(cell.tokens**2) * cell.dim * cell.dtype.itemsize**2)


def attention_case(form: str, tokens: int, dim: int, dtype: torch.dtype) -> Case:
    batch, heads = (2, 2) if CUDA or 1 < tokens <= 65 else (1, 1)
    if "class token" in form or tokens == 1:  # the rounding of one row's sum is all there is of its error: more rows
        batch, heads = 4, 4
    rows = {name: _draw(batch, heads, tokens, dim, dtype=dtype) for name in "qkv"}
    row = {"q": rows["q"].detach()[:, :, :1].requires_grad_()}
    norms = {f"{name}_{part}": _draw(dim, dtype=dtype, shift=part == "weight") for name in "qk" for part in _PARTS}
    # unrotated, a bias on every key moves all scores of a query alike: its gradient is zero, and its error all noise
    unbiased = {name: value for name, value in norms.items() if name != "k_bias"}
    unrotated = functools.partial(_prepared, k_bias=None, rope=None)
    scales = {name: value for name, value in norms.items() if name.endswith("weight")}
    angles = _draw(max(tokens - 1, 0), dim, dtype=torch.float32).detach()
    table, prefix = torch.cat([angles.sin(), angles.cos()], dim=-1), min(tokens, 1)
    if form == "plain":
        return ops.attention, rows
    if form == "class token":
        return ops.attention, rows | row
    if form == "causal":
        return functools.partial(ops.attention, is_causal=True), rows
    if form == "key padding":
        lengths = torch.tensor([max(1, tokens * (3 + index) // 5) for index in range(batch)], device=DEVICE)
        keys = torch.arange(tokens, device=DEVICE) < lengths.view(batch, 1, 1, 1)
        return functools.partial(ops.attention, attn_mask=keys), rows
    if form == "bool mask":
        mask = torch.rand(1, heads, tokens, tokens).to(DEVICE) > 0.3
        mask[..., 0] = True
        return functools.partial(ops.attention, attn_mask=mask), rows
    if form == "additive mask":
        return functools.partial(_masked, bias=_draw(1, heads, tokens, tokens, dtype=dtype).detach()), rows
    if form == "norms":
        return unrotated, rows | unbiased
    if form == "RMS norms":
        return functools.partial(unrotated, q_bias=None, rms=True), rows | scales
    if form == "class token, norms":
        return unrotated, rows | row | unbiased
    if form in ("norms and rope (half)", "norms and rope (interleaved)"):
        return functools.partial(_prepared, rope=Rope(table, prefix, "half" in form)), rows | norms
    if form == "packed":
        return functools.partial(ops.attention_packed, num_heads=2), {"qkv": _draw(1, tokens, 6 * dim, dtype=dtype)}
    if form == "ragged":
        ragged = {name: _draw(tokens + tokens // 2, 1, dim, dtype=dtype) for name in "qkv"}
        bounds = torch.tensor([0, tokens, tokens + tokens // 2], device=DEVICE)
        return functools.partial(ops.attention_varlen, cu_seqlens=bounds, max_seqlen=tokens), ragged
    raise ValueError(f"accuracy: {form!r} is no form")


def patch_case(form: str, side: int, dim: int, dtype: torch.dtype) -> Case:
    layout = torch.channels_last if "channels last" in form else torch.contiguous_format
    inputs = {"weight": _draw(dim, 3, 16, 16, dtype=dtype, scale=768**-0.5), "bias": _draw(dim, dtype=dtype, scale=0.1)}
    inputs |= {"pos_embed": _draw((side // 16) ** 2 + 1, dim, dtype=dtype), "prefix": _draw(1, dim, dtype=dtype)}
    if "float" in form:
        images = _draw(2, 3, side, side, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
        return ops.patch_embed, {"images": images} | inputs
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8).to(DEVICE).contiguous(memory_format=layout)
    normal = {"mean": torch.tensor([0.48, 0.46, 0.41], device=DEVICE), "std": torch.full((3,), 0.23, device=DEVICE)}
    return functools.partial(ops.patch_embed, pixels, **normal), inputs


_PARTS = ("weight", "bias")
FORMS = (
    "plain", "class token", "packed", "ragged", "causal", "key padding", "bool mask", "additive mask", "norms",
    "RMS norms", "class token, norms", "norms and rope (half)", "norms and rope (interleaved)",
)  # fmt: skip
PATCHES = tuple(f"patches of {kind}{layout}" for kind in ("float", "uint8") for layout in ("", ", channels last"))


def _draw(*size: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(size) * scale + shift).to(DEVICE, dtype).requires_grad_()


def _masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ops.attention(q, k, v, attn_mask=bias.to(q.dtype))


def _prepared(q, k, v, q_weight, q_bias, k_weight, k_bias, rope: Rope | None, rms: bool = False) -> Tensor:
    if rope is not None and q.dtype == torch.float64:
        rope = rope._replace(table=rope.table.double())
    norms = {"q_norm": HeadNorm(q_weight, q_bias, rms=rms), "k_norm": HeadNorm(k_weight, k_bias, rms=rms)}
    return ops.attention(q, k, v, **norms, rope=rope)


def measure(cell: Cell) -> list[dict[str, Any]]:
    """A row for the output and for the gradient of every input."""
    torch.manual_seed(zlib.crc32(cell.name.encode()))
    case = patch_case if cell.form in PATCHES else attention_case
    fn, inputs = case(cell.form, cell.tokens, cell.dim, cell.dtype)
    with torch.no_grad(), use_backend("torch"):
        size = fn(**inputs)
    dout = torch.randn(size.shape, generator=torch.Generator().manual_seed(1)).to(size)
    results = []
    for backend, tensors in (("triton", inputs), ("torch", inputs), ("reference", cast_inputs(inputs, torch.float64))):
        with use_backend(backend):
            results.append(run_with_gradients(fn, tensors, dout))
    return [_row(cell, name, *(result[name] for result in results)) for name in results[0]]


def _row(cell: Cell, tensor: str, ours: Tensor, stock: Tensor, exact: Tensor) -> dict[str, Any]:
    found = accuracy(ours, stock, exact)
    errors = {
        "rms_error": found.rms_error,
        "rms_error_stock": found.rms_error_eager,
        "max_error": found.max_error,
        "max_error_stock": found.max_error_eager,
    }
    label = {"form": cell.form, "dtype": str(cell.dtype).removeprefix("torch."), "tokens": cell.tokens, "dim": cell.dim}
    # one key takes all the weight, whatever its score: what is not zero is rounding
    zero = cell.tokens == 1 and cell.form in FORMS and tensor in SCORES
    passed = found.max_error < NOISE if zero else found.passed
    rounded = {name: float(f"{value:.4g}") for name, value in errors.items()}
    return label | {"tensor": tensor, **rounded, "zero": zero, "passed": passed}


def run(wanted: list[Cell], workers: int) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    if CUDA:
        yield from ((cell, measure(cell)) for cell in wanted)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from zip(wanted, pool.map(measure, wanted), strict=True)


def ratio(row: dict[str, Any], kind: str = "rms_error") -> float | None:
    """Ours over stock's; none where both are exact or nothing but noise."""
    stock = row[f"{kind}_stock"]
    return None if row["zero"] or not stock else row[kind] / stock


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table with a line for each form, dtype and tensor, over its lengths and head dims."""
    yield from (HEAD, "|---|---|---|" + "---:|" * 6)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (*FORMS, *PATCHES).index(row["form"])):
        groups.setdefault((row["form"], row["dtype"], row["tensor"]), []).append(row)
    for group, members in groups.items():
        judged = [row for row in members if ratio(row) is not None]
        if not judged:
            continue
        worst = max(judged, key=lambda row: ratio(row) or 0.0)
        rms = [ratio(row) or 0.0 for row in judged]
        largest = max(ratio(row, "max_error") or 0.0 for row in judged)
        yield (
            f"| {' | '.join(group)} | {len(judged)} | {statistics.median(rms):.2f} | {max(rms):.2f} |"
            f" {worst['tokens']} x {worst['dim']} | {largest:.2f} | {sum(value > 1.0 for value in rms)} |"
        )


def verdict(rows: list[dict[str, Any]]) -> str:
    above = sum((ratio(row) or 0.0) > 1.0 for row in rows)
    failed = sum(not row["passed"] for row in rows)
    return (
        f"{len(rows)} rows, {HOW}: {len(rows) - above} at or below stock's RMS error, {above} above;"
        f" {len(rows) - failed} passed, {failed} failed"
    )


def report(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    about = f"Error against float64 over stock's in the same dtype, {HOW}. Written by `python benchmarks/accuracy.py`."
    versions = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}; {facts['date'][:10]}."
    return "\n".join([about, versions, "", verdict(rows), "", *summary(rows), ""])


def write_json(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A row a line."""
    passed = json.dumps(all(row["passed"] for row in rows))
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'{{"machine": {json.dumps(facts | {"run": HOW})},\n"kind": "accuracy", "passed": {passed}, "rows": [\n'
    path.write_text(f"{head}{lines}\n]}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="short sequences, one patch embedding")
    size.add_argument("--full", action="store_true", help="every form at every length and head dim, as on a GPU")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table of ratios here")
    args = parser.parse_args()
    wanted = [cell for cell in cells(args.quick, args.full or (CUDA and not args.quick)) if args.only in cell.name]
    found: list[dict[str, Any]] = []
    print(f"{'case':<46} {'dtype':<9} {'tensor':<14} {'rms':>9} {'stock':>9} {'ratio':>6} {'max':>9} {'stock':>9}")
    for cell, rows in run(wanted, args.workers):
        found += rows
        for row in rows:
            share = ratio(row)
            print(
                f"{cell.name:<46} {row['dtype']:<9} {row['tensor']:<14} {row['rms_error']:9.2e}"
                f" {row['rms_error_stock']:9.2e} {'-' if share is None else f'{share:.2f}':>6}"
                f" {row['max_error']:9.2e} {row['max_error_stock']:9.2e}" + ("" if row["passed"] else "  MISSED"),
                flush=True,
            )
    if found and args.json:
        write_json(args.json, machine(DEVICE), found)
    if found and args.markdown:
        args.markdown.write_text(report(found, machine(DEVICE)))
    print(verdict(found))
    return int(not found or not all(row["passed"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
