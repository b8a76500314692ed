"""Print the floor of every op: operations, bytes, and the time below which no kernel can come.

    python benchmarks/roofline.py [--shape base,large] [--batch 256] [--dtype bfloat16] [--tflops 788] [--tbs 4.3]

Counts are those of fastvit.bench.costs. The ceilings default to what one H200 reached: 788 TFLOP/s in a bfloat16
product of 8192^3 random values, 4.3 TB/s in a device copy (read + write). For another device or dtype give its own.
Floors are arithmetic, not measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastvit.bench import OPS
from fastvit.bench.costs import op_cost
from fastvit.testing import VIT_SHAPES

MODES = ("fwd", "bwd")


def rows(
    shapes: list[str], ops: list[str], batch: int, itemsize: int, flops_per_s: float, bytes_per_s: float
) -> Iterator:
    for shape in shapes:
        for op in ops:
            for mode in MODES:
                cost = op_cost(op, VIT_SHAPES[shape], batch, itemsize, mode)
                compute, memory = cost.flops / flops_per_s, cost.bytes / bytes_per_s
                yield {
                    "op": op,
                    "mode": mode,
                    "shape": shape,
                    "batch": batch,
                    "gflop": cost.flops / 1e9,
                    "mb": cost.bytes / 1e6,
                    "compute_us": compute * 1e6,
                    "memory_us": memory * 1e6,
                    "floor_us": cost.seconds(flops_per_s, bytes_per_s) * 1e6,
                    "bound": "compute" if compute > memory else "memory",
                }


def line(row: dict[str, Any]) -> str:
    numbers = (row[key] for key in ("gflop", "mb", "compute_us", "memory_us", "floor_us"))
    return (
        f"{row['op']:<18}{row['mode']:<5}{row['shape']:<8}"
        + "".join(f"{n:>12.1f}" for n in numbers)
        + f"  {row['bound']}"
    )


def names_of(text: str, known: Any, what: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"roofline: {what} is {unknown[0]!r}, expected some of {', '.join(known)}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default=",".join(VIT_SHAPES), help=f"a,b,... of {', '.join(VIT_SHAPES)}")
    parser.add_argument("--ops", default=",".join(OPS), help=f"a,b,... of {', '.join(OPS)}")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tflops", type=float, default=788.0, help="ceiling of matrix products, TFLOP/s")
    parser.add_argument("--tbs", type=float, default=4.3, help="ceiling of memory, TB/s")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    shapes = names_of(args.shape, VIT_SHAPES, "--shape")
    ops = names_of(args.ops, OPS, "--ops")
    itemsize = getattr(torch, args.dtype).itemsize
    found = list(rows(shapes, ops, args.batch, itemsize, args.tflops * 1e12, args.tbs * 1e12))
    if args.json:
        print(json.dumps({"ceilings": {"tflops": args.tflops, "tbs": args.tbs}, "rows": found}, indent=1))
        return 0
    print(f"batch {args.batch}, {args.dtype}; ceilings {args.tflops:g} TFLOP/s, {args.tbs:g} TB/s")
    heads = ("GFLOP", "MB", "compute us", "memory us", "floor us")
    print(f"{'op':<18}{'mode':<5}{'shape':<8}" + "".join(f"{head:>12}" for head in heads) + "  bound")
    print("\n".join(line(row) for row in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
