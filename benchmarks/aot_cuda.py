"""What the compiler made of every CUDA kernel: registers, shared memory, spills, wgmma instructions. Needs no GPU.

python benchmarks/aot_cuda.py [--arch 90a] [--json] [name ...]      exits 1 when a kernel spills

Read from the built library (fastvit/_cuda.stable.so) where it is newer than its sources; its kernels for Hopper take
minutes to compile. Otherwise, for single files and for the other architectures (86, 89, 120), the .cu files of
csrc/cuda are compiled, without Hopper's products; by name also Hopper's attention (attention_bf16, attention_fp16). A
pass of 8 elements a thread has to load and store 16 bytes. Products of attention must not wait for each other.
"""

from __future__ import annotations

import argparse
import importlib.util
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
LIBRARY = ROOT / "fastvit" / "_cuda.stable.so"
ARCHES = ("80", "90a", "100")
STATIC_SHARED_LIMIT = 48 * 1024  # bytes a block, on every architecture
HOPPER_SHARED_LIMIT = 227 * 1024
# The kernels that take 8 elements a thread; the others read and write one
VECTOR_KERNEL = re.compile(r"pass_kernel<8,|layer_scale_bwd_kernel<\w+, 8>|layernorm_(fwd|bwd)_kernel<")
# What launch_overlapping and sm90's launch start while the kernel before is still running; see csrc/cuda/common.cuh
OVERLAPPING = re.compile(r"layernorm_fwd_kernel<|device_kernel<sm90::|attention_(fwd|bwd)_kernel<")
WIDE_MOVE = re.compile(r"\.(128|256)")  # bits; loads straight into shared memory (LDGSTS) count as loads
DTYPES, TILES = ("fp32", "fp16", "bf16"), ("large", "small")
# A product's name: op, dtype, tile, the residual stream's dtype and the shared memory it asks
# for; see csrc/cuda/sm90
PRODUCT = re.compile(r"device_kernel<sm90::(\w+)Kernel<\(DType\)(\d), \(sm90::Tile\)(\d), (?:\(DType\)(\d), )?(\d+)>")

# Direction, dtype, keys, the forward's head dim, shared memory
ATTENTION = re.compile(r"sm90::attention_(fwd|bwd)_kernel<\(DType\)(\d), (\d+), (?:(\d+), )?(\d+)>")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    spec = importlib.util.find_spec("triton")
    places = [f"{home}/bin"] if home else []
    places += [f"{place}/backends/nvidia/bin" for place in (spec.submodule_search_locations if spec else None) or []]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))


def is_fresh(library: Path) -> bool:
    """Whether ``library`` was built from the sources as they are."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    return library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def read_library(library: Path, arch: str) -> list[dict]:
    """One row a kernel of ``library`` on sm_``arch``."""
    tool = find_cuobjdump() or "cuobjdump"

    def ask(what: str) -> str:
        command = [tool, "--gpu-architecture", f"sm_{arch}", what, str(library)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return list(parse_usage(ask("--dump-resource-usage"), count_instructions(ask("--dump-sass")), arch))


def parse_usage(text: str, instructions: dict[str, dict], arch: str) -> Iterator[dict]:
    """Rows from cuobjdump's resource usage. What spills, and any other local array, shows as STACK or LOCAL."""
    for name, usage in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text):
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        row = {
            "kernel": name,
            "module": "cuda",
            "arch": int(arch.rstrip("af")),
            "registers": used["REG"],
            "shared": used["SHARED"],
            "spills": used["STACK"] + used["LOCAL"],
        }
        row |= instructions.get(name, {})
        yield row | {"problems": problems(row)}


def count_instructions(sass: str) -> dict[str, dict]:
    """Each kernel's matrix instructions, and (wide, all) loads and stores, in a listing; wide is 16 bytes and more."""
    found: dict[str, dict] = {}
    parts = re.split(r"Function : (\w+)", sass)[1:]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        moves = {key: re.findall(rf"\b{key}(?:STS)?\.E[.\w]*", body) for key in ("LDG", "STG")}
        row: dict = {key: (sum(map(bool, map(WIDE_MOVE.search, each))), len(each)) for key, each in moves.items()}
        row["waits"] = body.count("ACQBULK")
        # warps with tasks of their own lie in the listing one after the other: there the loads by TMA must come later
        touches = "UTMALDG" if "USETMAXREG" in body else r"UTMALDG|UTMASTG|(?:LD|ST|RED|ATOM)G?"
        row["early"] = len(re.findall(rf"\b(?:{touches})\b", body.partition("ACQBULK")[0]))
        if "HGMMA" in body:
            row |= {"wgmmas": body.count("HGMMA"), "matrix": "wgmma.mma_async"}
            row["wgmma_waits"] = body.count("WARPGROUP.DEPBAR")
            row["touched"] = list(touched_under_way(body))
        found[name] = row
    return found


def touched_under_way(body: str) -> Iterator[str]:
    """Instructions that touch sums or left operands of products not waited for yet, in the listing's order."""
    groups: list[set[int]] = [set()]  # the last is not complete
    for code in re.findall(r"\*/ +([^;/\n]+);", body):
        if product := re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+),)?", code):
            columns, sums, left = (int(number or -4) for number in product.groups())
            groups[-1] |= {*range(sums, sums + columns // 2), *range(left, left + 4)}
            if "gsb0" in code:
                groups.append(set())
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", code):
            groups = groups[-1 - int(wait[1], 0) :]
        elif any(groups):
            touched = {first + i for first, span in _registers(code) for i in range(span)}
            if not touched.isdisjoint(set().union(*groups)):
                yield code.strip()


def _registers(code: str) -> Iterator[tuple[int, int]]:
    """(first, how many) of an instruction's registers; all but addresses are as wide as it says."""
    wide = 4 if ".128" in code or ".M88.4" in code else 2 if ".64 " in code else 1
    for place, number in re.findall(r"(\[?)(?<![UPB\w])R(\d+)", code):
        yield int(number), 1 if place else wide


def check_width(row: dict) -> list[str]:
    """What a kernel named as one of vectors moves in smaller pieces. Row statistics are single numbers."""
    if not VECTOR_KERNEL.search(row["kernel"]) or "STG" not in row:
        return []
    narrow = [f"no 16-byte {word}" for key, word in (("LDG", "load"), ("STG", "store")) if not row[key][0]]
    wide, every = row["STG"]
    if row["kernel"].startswith("pass_kernel") and wide < every:
        narrow.append(f"{every - wide} of {every} stores below 16 bytes")
    return narrow


def check_wait(row: dict) -> list[str]:
    """A kernel that may start before the one before it has ended, and would read what that has yet to write."""
    if row["arch"] < 90 or not OVERLAPPING.search(row["kernel"]):
        return []
    if not row.get("waits", 1):
        return ["starts early and does not wait for the kernel before it"]
    return ["touches memory before it waits for the kernel before it"] if row.get("early") else []


def name_product(row: dict) -> dict:
    """A product's row by its op, dtype and tile, with all of its shared memory; other rows as they are."""
    match = PRODUCT.search(row["kernel"])
    if not match:
        return row
    op = re.sub(r"(?<!^)(?=[A-Z])", "_", match[1]).lower()
    dtype, stream = DTYPES[int(match[2])], DTYPES[int(match[4] or match[2])]
    name = " ".join([op, dtype, TILES[int(match[3])]]) + (f" {stream} stream" if stream != dtype else "")
    return check_hopper(row | {"kernel": name, "shared": int(match[5])})


def name_attention(row: dict) -> dict:
    """A row of Hopper's attention by its dtype, keys and head dim, with all of its shared memory."""
    match = ATTENTION.search(row["kernel"])
    if not match:
        return row
    name = f"attention_{match[1]} {DTYPES[int(match[2])]} n{match[3]} d{match[4] or 64}"
    row = check_hopper(row | {"kernel": name, "shared": int(match[5])})
    if row.get("wgmmas", 0) and row["wgmma_waits"] * 4 > row["wgmmas"]:  # else the compiler has put waits between them
        row["problems"] = [*row["problems"], f"{row['wgmma_waits']} waits for {row['wgmmas']} products"]
    if touched := row.get("touched"):
        row["problems"] = [*row["problems"], f"{len(touched)} instructions touch products under way: {touched[0]}"]
    return row


def check_hopper(row: dict) -> dict:
    row["module"] = "sm90"
    if not row.get("wgmmas"):
        row["problems"] = [*row["problems"], "no wgmma"]
    if row["shared"] > HOPPER_SHARED_LIMIT:
        row["problems"] = [*row["problems"], f"shared memory {row['shared']} above {HOPPER_SHARED_LIMIT}"]
    return row


def hopper_flags() -> list[str]:
    """As setup.py compiles csrc/cuda/sm90."""
    spec = importlib.util.find_spec("cutlass_library")
    places = [os.environ["CUTLASS_PATH"]] if os.environ.get("CUTLASS_PATH") else []
    places += [f"{place}/source" for place in (spec.submodule_search_locations if spec else None) or []]
    flags = ["--expt-relaxed-constexpr", "-DNDEBUG", "-DCUTLASS_ENABLE_GDC_FOR_SM90"]
    return [*flags, *(f"-isystem={place}/include" for place in places[:1])]


def compile_source(source: Path, arch: str) -> list[dict]:
    """One row a kernel of ``source`` on sm_``arch``."""
    with tempfile.TemporaryDirectory() as work:
        cubin = f"{work}/kernels.cubin"
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", cubin]
        flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
        flags += hopper_flags() if source.parent.name == "sm90" else []
        done = subprocess.run([find_nvcc() or "nvcc", *flags, *target, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"aot: {source.name} does not compile for sm_{arch}\n{done.stderr}")
        instructions = {}
        if find_cuobjdump():
            listing = subprocess.run(
                [find_cuobjdump(), "--dump-sass", cubin], capture_output=True, text=True, check=True
            )
            instructions = count_instructions(listing.stdout)
    return [row | instructions.get(row["kernel"], {}) for row in parse_ptxas(done.stderr, source.stem, arch)]


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
    names, arches = list(names), list(arches)
    if not names and set(arches) <= set(ARCHES) and is_fresh(LIBRARY) and find_cuobjdump():
        return named([row for arch in arches for row in read_library(LIBRARY, arch)])
    if find_nvcc() is None:
        print("aot: skipping the CUDA kernels: nvcc is not on the PATH, nor under CUDA_HOME", file=sys.stderr)
        return []
    wanted = set(names)
    folder = ROOT / "csrc" / "cuda"
    sources = [path for path in sorted(folder.glob("*.cu")) if not wanted or path.stem in wanted]
    jobs = [(source, arch) for source in sources for arch in arches]
    hopper = [path for path in sorted((folder / "sm90").glob("attention_*.cu")) if path.stem in wanted]
    jobs += [(source, arch) for source in hopper for arch in arches if arch == "90a"]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        found = [row for part in pool.map(lambda job: compile_source(*job), jobs) for row in part]
    if not names and not is_fresh(LIBRARY):
        print(f"aot: {LIBRARY.name} is older than its sources: Hopper's products are left out", file=sys.stderr)
    return named(found)


def named(found: list[dict]) -> list[dict]:
    for row, name in zip(found, demangle(row["kernel"] for row in found), strict=True):
        early = check_wait(row | {"kernel": name})
        row |= name_attention(name_product(row | {"kernel": name}))
        row["problems"] = [*row["problems"], *early, *check_width(row)]
        row["kernel"] = f"{row['module']}: {row['kernel']}"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of csrc/cuda, without .cu; default all")
    parser.add_argument("--arch", action="append", help="80, 90a, 100; also 86, 89, 120; default the first three")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    found = rows(options.names, options.arch or ARCHES)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{'arch':>4} {'regs':>5} {'shared':>7} {'spills':>6} {'HGMMA':>5} {'LDG.128':>7} {'STG.128':>7} kernel")
        for row in found:
            numbers = f"{row['arch']:>4} {row['registers']:>5} {row['shared']:>7} {row['spills']:>6}"
            numbers += f" {row.get('wgmmas', '-'):>5}"
            numbers += "".join(f" {'/'.join(map(str, row.get(key, '-'))):>7}" for key in ("LDG", "STG"))
            print(f"{numbers} {row['kernel']}" + "".join(f"  FAILED: {problem}" for problem in row["problems"]))
    failed = sum(bool(row["problems"]) for row in found)
    print(f"{len(found) - failed} passed, {failed} failed", file=sys.stderr)
    return int(failed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
