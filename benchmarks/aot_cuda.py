"""Compile every .cu file ahead of time and read what ptxas says: registers, shared memory, spills. Needs no GPU.

python benchmarks/aot_cuda.py [--arch 90a] [--json] [name ...]      exits 1 when a kernel spills
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHES = ("80", "90a", "100")
STATIC_SHARED_LIMIT = 48 * 1024  # bytes a block, on every architecture


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def compile_source(source: Path, arch: str) -> list[dict]:
    """One row a kernel of ``source`` on sm_``arch``."""
    with tempfile.TemporaryDirectory() as work:
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", f"{work}/kernels.cubin"]
        flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
        done = subprocess.run([find_nvcc() or "nvcc", *flags, *target, str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"aot: {source.name} does not compile for sm_{arch}\n{done.stderr}")
    return list(parse_ptxas(done.stderr, source.stem, arch))


def parse_ptxas(log: str, file: str, arch: str) -> Iterator[dict]:
    """Rows of the form that ``benchmarks/aot.py`` prints; ``arch`` is a number there, 90 for sm_90a."""
    for entry in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", entry)
        used = re.search(r"Used (\d+) registers(.*)", entry)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        if not (name and used and spills):
            raise RuntimeError(f"aot: cannot read what ptxas says of {file} on sm_{arch}\n{entry}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        row = {
            "kernel": name[1],
            "module": file,
            "arch": int(arch.rstrip("af")),
            "registers": int(used[1]),
            "shared": int(shared[1]) if shared else 0,
            "spills": int(spills[1]) + int(spills[2]),
        }
        yield row | {"problems": problems(row)}


def problems(row: dict) -> list[str]:
    found = [f"spills {row['spills']} bytes a thread"] if row["spills"] else []
    if row["shared"] > STATIC_SHARED_LIMIT:
        found.append(f"shared memory {row['shared']} above {STATIC_SHARED_LIMIT}")
    return found


def demangle(names: Iterable[str]) -> list[str]:
    """Readable kernel names, without namespaces and arguments; as they are where c++filt is missing."""
    names = list(names)
    if not names or not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    text = done.stdout
    for old, new in {r"fastvit::|^void ": "", "__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}.items():
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return text.splitlines()


def rows(names: Iterable[str] = (), arches: Iterable[str] = ARCHES) -> list[dict]:
    """``[{kernel, module, arch, registers, shared, spills, problems}]`` of the named files, or of all.

    Where nvcc is missing there are none, and a line says so.
    """
    if find_nvcc() is None:
        print("aot: skipping the CUDA kernels: nvcc is not on the PATH, nor under CUDA_HOME", file=sys.stderr)
        return []
    wanted = set(names)
    sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if not wanted or path.stem in wanted]
    jobs = [(source, arch) for source in sources for arch in arches]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        found = [row for part in pool.map(lambda job: compile_source(*job), jobs) for row in part]
    for row, name in zip(found, demangle(row["kernel"] for row in found), strict=True):
        row["kernel"] = f"{row['module']}: {name}"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of csrc/cuda, without .cu; default all")
    parser.add_argument("--arch", action="append", help="80, 90a or 100, once each; default all")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    found = rows(options.names, options.arch or ARCHES)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{'arch':>4} {'regs':>5} {'shared':>7} {'spills':>6} kernel")
        for row in found:
            numbers = f"{row['arch']:>4} {row['registers']:>5} {row['shared']:>7} {row['spills']:>6}"
            print(f"{numbers} {row['kernel']}" + "".join(f"  FAILED: {problem}" for problem in row["problems"]))
    failed = sum(bool(row["problems"]) for row in found)
    print(f"{len(found) - failed} passed, {failed} failed", file=sys.stderr)
    return int(failed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
