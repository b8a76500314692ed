"""Compile every shipped kernel setting without a GPU, and hold it to its resources.

Triton: each ``aot_cases()`` of fastvit.kernels for sm_80, sm_90 and sm_100. CUDA: the rows of benchmarks/aot_cuda.py.
The waste of an attention kernel is the share of its matrix products that falls on padding, at the length in its name.
Rules: no spills, shared memory within the block's limit, and wgmma on sm_90 wherever 16-bit matrices of its 64 rows or
more are multiplied.

    python benchmarks/aot.py [--only TEXT] [--arch 90] [--quick | --full] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODULES = ("attention", "attention_few", "attention_general", "patch_embed")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # fastest first
DOT_16 = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)")  # its rows
WGMMA_ROWS = 64


@cache
def cases(module: str, arch: int) -> list[Any]:
    """The module's cases for this architecture; what would compile to the same code is kept once."""
    make = importlib.import_module(f"fastvit.kernels.{module}").aot_cases
    made = make(arch) if inspect.signature(make).parameters else make()
    unique = {}
    for case in made:
        what = (case.fn.fn.__name__, case.signature, case.constexprs, case.num_warps, case.num_stages, case.divisible)
        unique.setdefault(repr(what), case)
    return list(unique.values())


def compile_one(module: str, index: int, arch: int) -> dict[str, Any]:
    case = cases(module, arch)[index]
    row = {"kernel": case.name, "module": module, "arch": arch, "warps": case.num_warps, "stages": case.num_stages}
    start = time.monotonic()
    try:
        compiled = case.compile(arch)
    except Exception as error:  # a kernel that does not compile is a row like any other
        while error.__cause__ is not None:
            error = error.__cause__
        return row | {"problems": [f"does not compile: {' '.join(str(error).split())[-300:]}"]}
    row |= resources(compiled.asm["cubin"])
    row |= {
        "shared": compiled.metadata.shared,
        "matrix": next((name for name in MATRIX if name in compiled.asm["ptx"]), None),
        "rows_16": max(map(int, DOT_16.findall(compiled.asm["ttir"])), default=0),
        "seconds": time.monotonic() - start,
    }
    if case.waste is not None:
        row["waste"] = case.waste
    return row | {"problems": problems(row)}


def problems(row: dict[str, Any]) -> list[str]:
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']} bytes a thread")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"shared memory {row['shared']} above {SHARED_LIMIT[row['arch']]}")
    if row["arch"] == 90 and row["rows_16"] >= WGMMA_ROWS and row["matrix"] != "wgmma.mma_async":
        found.append("no wgmma")
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory a thread, from the binary itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def jobs_of(module: str, arch: int, args: argparse.Namespace) -> Iterable[tuple[str, int, int]]:
    """float16 differs from bfloat16 in the type of an element alone: by default one architecture speaks for it."""
    wanted = [
        index
        for index, case in enumerate(cases(module, arch))
        if args.only in case.name and (args.full or arch == 90 or not re.search(r"(?<!b)float16", case.name))
    ]
    return [(module, index, arch) for index in (wanted[::3] if args.quick and arch != 90 else wanted)]


def triton_rows(archs: Iterable[int], args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    jobs = [job for module in MODULES for arch in archs for job in jobs_of(module, arch, args)]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        yield from pool.map(compile_one, *zip(*jobs, strict=True)) if jobs else ()


def cuda_rows(archs: Iterable[int], only: str) -> Iterable[dict[str, Any]]:
    """Rows of the same form from the CUDA library; none, with a line that says so, where nvcc is missing."""
    sys.path.insert(0, str(Path(__file__).parent))
    import aot_cuda

    wanted = [arch for arch in aot_cuda.ARCHES if int(arch.rstrip("af")) in archs]
    yield from (row for row in aot_cuda.rows(arches=wanted) if only in row["kernel"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--arch", type=int, action="append", choices=list(SHARED_LIMIT), help="default: all")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="every third Triton kernel where it is not for sm_90")
    size.add_argument("--full", action="store_true", help="float16 on every architecture, not on sm_90 alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    archs = args.arch or list(SHARED_LIMIT)
    start = time.monotonic()
    rows = []
    print(f"{'kernel':<58} {'arch':>4} {'regs':>5} {'shared':>7} {'spills':>6} {'matrix':<15} waste")
    for source in (triton_rows(archs, args), cuda_rows(archs, args.only)):
        for row in source:
            rows.append(row)
            found = [row.get(key, "-") for key in ("registers", "shared", "spills")]
            print(
                f"{row['kernel']:<58} {row['arch']:>4} {found[0]:>5} {found[1]:>7} {found[2]:>6} "
                + (row.get("matrix") or "-").ljust(15)
                + (f"{row['waste']:6.0%}" if "waste" in row else "")
                + "".join(f"  FAILED: {problem}" for problem in row["problems"]),
                flush=True,
            )
    failed = sum(bool(row["problems"]) for row in rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(f"aot: {len(rows)} kernels in {time.monotonic() - start:.0f} s")
    print(f"{len(rows) - failed} passed, {failed} failed")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
