"""Build the compiled parts: ``fastvit._C`` (C++ for the CPU) and ``fastvit/_cuda.stable.so`` (CUDA, no Python in it).

FASTVIT_SKIP_BUILD=1   pure Python: every op still runs, through PyTorch or Triton
FASTVIT_FORCE_CUDA=1   a CUDA part that cannot be built is an error, not a skip
FASTVIT_SANITIZE       address (or 1): C++ part with AddressSanitizer and UBSan; thread: with ThreadSanitizer; no CUDA
CUTLASS_PATH           CUTLASS 4.2 for Hopper's products: a checkout, where the nvidia-cutlass wheel is not installed
MAX_JOBS, NVCC_THREADS, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX as in PyTorch's own extensions
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "fastvit._cuda"
CUDA_FILENAME = "_cuda.stable.so"
DEFAULT_ARCHES = "8.0;9.0a;10.0+PTX"
# The oldest LibTorch whose stable ABI the CUDA library uses: one build serves every later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "off", "no")


def say(message: str) -> None:
    print(f"fastvit: {message}", file=sys.stderr, flush=True)


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(f"*{suffix}"))


def headers() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for end in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{end}"))


def find_cxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home) / "bin" / "nvcc" if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers: under CUTLASS_PATH, build/cutlass or in the nvidia-cutlass wheel."""
    candidates = [Path(os.environ["CUTLASS_PATH"])] if os.environ.get("CUTLASS_PATH") else []
    candidates.append(ROOT / "build" / "cutlass" / "cutlass_library" / "source")
    spec = importlib.util.find_spec("cutlass_library")
    candidates += [Path(place) / "source" for place in (spec.submodule_search_locations if spec else None) or []]
    found = (path / "include" for path in candidates if (path / "include" / "cutlass" / "cutlass.h").exists())
    return next(found, None)


def arches() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES


def why_not_sm90() -> list[str]:
    """Reasons against Hopper's own matrix products, which cuBLAS and the passes of csrc/cuda stand in for."""
    reasons = []
    if not re.search(r"(?<![\d.])9\.0a", arches()):
        reasons.append(f"9.0a is not among the architectures ({arches()})")
    if find_cutlass() is None:
        reasons.append("CUTLASS is not here (pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH)")
    return reasons


def arch_flags(arches: str) -> list[str]:
    """``-gencode`` flags of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a;10.0+PTX"."""
    flags = []
    for arch in re.split(r"[;\s]+", arches.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {arch!r}, expected entries like 8.0, 9.0a or 10.0+PTX")
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def sanitizer_flags() -> list[str]:
    known = {"thread": "-fsanitize=thread", "address": "-fsanitize=address,undefined"}
    known["1"] = known["address"]
    name = os.environ["FASTVIT_SANITIZE"].lower()
    if name not in known:
        raise SystemExit(f"FASTVIT_SANITIZE is {name!r}, expected one of {', '.join(known)}")
    return [known[name]]


def only_isa() -> list[str]:
    """Macros that leave out the vector code this machine does not run: under a sanitizer one set takes minutes."""
    from torch.backends.cpu import get_cpu_capability

    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(get_cpu_capability(), "baseline")
    kept = os.environ.get("FASTVIT_CPU_ISA") or best
    return [f"-DFASTVIT_WITHOUT_{isa.upper()}" for isa in ("avx512", "avx2", "baseline") if isa != kept]


def cpp_extension() -> Extension | None:
    if not find_cxx():
        say("no C++ compiler found (CXX, c++, g++): installing pure Python, CPU ops run through PyTorch")
        return None
    files = ["csrc/bindings.cpp", *sources("csrc/cpu/simd", ".cpp"), *sources("csrc/cpu", ".cpp")]
    if not (ROOT / files[0]).exists():
        say("csrc/bindings.cpp is missing: skipping the C++ part")
        return None
    from torch.utils.cpp_extension import CppExtension

    # Without debug information, which Python asks for and which takes half of the time
    compile_args, link_args = ["-O3", "-g0", "-fvisibility=hidden"], []
    if flag("FASTVIT_SANITIZE"):
        link_args = sanitizer_flags()
        compile_args = ["-O1", "-g1", "-fno-omit-frame-pointer", *link_args, *only_isa()]
        if "-fsanitize=thread" in link_args:
            files += sources("csrc/sanitize", ".cpp")
            link_args.append("-Wl,--wrap=GOMP_parallel")
    return CppExtension(
        "fastvit._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        # Threads come from the libgomp that torch loads, so nothing is linked: one OpenMP runtime in the process.
        extra_compile_args=["-std=c++20", *compile_args, "-fopenmp", "-Wno-psabi"],
        extra_link_args=link_args,
    )


def cuda_extension() -> Extension | None:
    if flag("FASTVIT_SANITIZE"):
        return None
    missing = []
    if not sys.platform.startswith("linux"):
        missing.append(f"the platform is {sys.platform}, the CUDA part is built on Linux")
    if not find_cxx():
        missing.append("no C++ compiler found")
    if not find_nvcc():
        missing.append("no nvcc found (CUDA_HOME, PATH)")
    if not missing:
        if why_not_sm90():
            say(f"building without Hopper's own products: {'; '.join(why_not_sm90())}")
        # The .cu files are not listed as sources: torch would ask for a CUDA build of itself.
        return Extension(CUDA_LIBRARY, sources("csrc/cuda", ".cpp"), depends=headers() + cuda_sources())
    if flag("FASTVIT_FORCE_CUDA"):
        raise SystemExit(f"FASTVIT_FORCE_CUDA is set, but {'; '.join(missing)}")
    say(f"skipping the CUDA part: {'; '.join(missing)}. LayerNorm and MLP on a GPU run through PyTorch")
    return None


def cuda_sources() -> list[str]:
    folders = ["csrc/cuda"] if why_not_sm90() else ["csrc/cuda/sm90", "csrc/cuda"]  # the slowest first
    return [source for folder in folders for end in (".cu", ".cpp") for source in sources(folder, end)]


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def cuda_ninja_file(build_dir: Path, output: Path) -> str:
    """One nvcc or C++ rule a source, and one link. Needs neither a GPU nor a CUDA build of torch."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc, cxx = find_nvcc(), find_cxx()
    cuda_home = Path(os.path.realpath(nvcc)).parent.parent
    if not (cuda_home / "include" / "cuda_runtime.h").exists():  # nvcc may be a wrapper script: ask it
        dry_run = subprocess.run([nvcc, "--dryrun", "-E", "x.cu"], capture_output=True, text=True)
        cuda_home = Path(re.search(r"^#\$ TOP=(.*)$", dry_run.stdout + dry_run.stderr, re.MULTILINE)[1].strip())
    base_flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-ccbin={cxx}"]
    nvcc_flags = [*base_flags, *arch_flags(arches())]
    if os.environ.get("NVCC_THREADS"):
        nvcc_flags.append(f"--threads={os.environ['NVCC_THREADS']}")
    sm90_flags = [
        *base_flags,
        *arch_flags("9.0a"),
        "--expt-relaxed-constexpr",
        "-DNDEBUG",
        "-DCUTLASS_ENABLE_GDC_FOR_SM90",  # its kernels wait for the one before them, see overlapping_launch
        f"-isystem={find_cutlass()}",
    ]
    cxx_flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA"]
    cxx_flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-isystem{cuda_home / 'include'}"]
    cxx_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    cxx_flags += [f"-isystem{path}" for path in include_paths()]
    link_flags = ["-shared", "-cudart=static", f"-ccbin={cxx}", *[f"-L{path}" for path in library_paths()]]
    # libtorch.so alone leads to the CUDA symbols; in a CPU build of torch it is empty, so as-needed would drop it.
    link_flags += ["-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    include = f"-I{ROOT / 'csrc'}"
    lines = [
        f"nvcc_flags = {' '.join(map(ninja_escape, [include, *nvcc_flags]))}",
        f"sm90_flags = {' '.join(map(ninja_escape, [include, *sm90_flags]))}",
        f"cxx_flags = {' '.join(map(ninja_escape, [include, *cxx_flags]))}",
        f"link_flags = {' '.join(map(ninja_escape, link_flags))}",
        "rule cu",
        f"  command = {nvcc} -MD -MF $out.d $nvcc_flags -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d\n  deps = gcc",
        "rule sm90_cu",
        f"  command = {nvcc} -MD -MF $out.d $sm90_flags -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d\n  deps = gcc",
        "rule cpp",
        f"  command = {cxx} -MD -MF $out.d $cxx_flags -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d\n  deps = gcc",
        "rule link",
        f"  command = {nvcc} $in $link_flags -o $out",
        "  description = $out",
    ]
    objects = []
    for source in cuda_sources():
        path = ROOT / source
        part = path.parent.name
        objects.append(ninja_escape(str(build_dir / f"{part}_{path.name}.o")))
        rule = "sm90_cu" if (part, path.suffix) == ("sm90", ".cu") else path.suffix[1:]
        lines.append(f"build {objects[-1]}: {rule} {ninja_escape(str(path))}")
    lines.append(f"build {ninja_escape(str(output))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_ext_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildCompiledParts(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            if fullname.split(".")[-1] != CUDA_LIBRARY.split(".")[-1]:
                return super().get_ext_filename(fullname)
            return str(Path(*fullname.split(".")[:-1]) / CUDA_FILENAME)

        def build_extension(self, ext: Extension) -> None:
            if ext.name != CUDA_LIBRARY:
                super().build_extension(ext)
                return
            build_dir = (Path(self.build_temp) / "cuda").resolve()
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            build_dir.mkdir(parents=True, exist_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            (build_dir / "build.ninja").write_text(cuda_ninja_file(build_dir, output))
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
            subprocess.run([ninja, *jobs, *["-v"] * bool(self.verbose > 1)], cwd=build_dir, check=True)

    return BuildCompiledParts


class BuildPython(build_py):
    """Leaves out ``fastvit/kernels.py``, which stands in for ``fastvit/kernels/`` in a source checkout only."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if entry[:2] != ("fastvit", "kernels")]


def compiled_parts() -> dict:
    if flag("FASTVIT_SKIP_BUILD"):
        if flag("FASTVIT_FORCE_CUDA"):
            raise SystemExit("FASTVIT_FORCE_CUDA and FASTVIT_SKIP_BUILD are both set, expected one of them")
        return {}
    extensions = [ext for ext in (cpp_extension(), cuda_extension()) if ext]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build_ext_command()}} if extensions else {}


parts = compiled_parts()
setup(
    packages=[*find_packages(include=["fastvit", "fastvit.*"]), "fastvit.kernels"],
    package_dir={"fastvit.kernels": "kernels"},
    package_data={"fastvit": ["py.typed"]},
    ext_modules=parts.get("ext_modules", []),
    cmdclass={"build_py": BuildPython, **parts.get("cmdclass", {})},
)
