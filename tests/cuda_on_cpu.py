"""Build csrc/cuda for the CPU: the same glue, launchers and kernels, with every CUDA thread a fiber.

``library()`` gives ``torch.ops.fastvit_cuda_on_cpu``: the ops of ``torch.ops.fastvit_cuda``, taking CPU tensors.
Needs nvcc's headers and a C++ compiler, no GPU. What it cannot show: speed, and bugs that need threads in parallel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
NAME = "fastvit_cuda_on_cpu"
CUDA, TESTS = ROOT / "csrc" / "cuda", ROOT / "tests"
# The passes, with the glue of Hopper's products and loops that stand in for the products themselves
PASSES = [path for path in CUDA.iterdir() if path.is_file()]
PASSES += [TESTS / name for name in ("sm90_on_cpu.cpp", "copy_async_on_cpu.h", "mm_on_cpu.cpp")]
PASSES += [CUDA / "sm90" / name for name in ("ops.cpp", "attention.cpp", "block.cpp", "block_bwd.cpp")]
# Hopper's attention as it is, on what Hopper's instructions do
ATTENTION = [*sorted((CUDA / "sm90").glob("attention*")), *sorted(TESTS.glob("hopper_*.h"))]
GLUE = ("runtime.cpp", "layernorm_mlp.cpp", "ops.cpp", "block.cpp", "block_bwd.cpp", "attention.cpp", "mm_on_cpu.cpp")
STANDS_FOR = {"hopper_on_cpu.h": "hopper.cuh", "copy_async_on_cpu.h": "copy_async.cuh"}
MULTIPROCESSORS = 2
COPIES_AT_ONCE = "FASTVIT_CUDA_ON_CPU_COPIES_AT_ONCE"  # set: not as late as a GPU may make them
MORE = "FASTVIT_CUDA_ON_CPU_MULTIPROCESSORS"  # the number of them that launches find instead

PERMISSIVE = "-Xcompiler=-fpermissive,-w"
FAILURE = "FASTVIT_CUDA_ON_CPU_FAILS"  # the number of an error: what every launch then ends in
RUNTIME = f"""
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <cstdint>
#include <cstdlib>
extern "C" {{
cudaError_t cudaGetDevice(int* device) {{ *device = 0; return cudaSuccess; }}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr, int) {{
  const char* number = std::getenv("{MORE}");
  *v = number == nullptr ? {MULTIPROCESSORS} : std::atoi(number);
  return cudaSuccess;
}}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {{
  *blocks = 4;
  return cudaSuccess;
}}
cudaError_t cudaGetLastError() {{
  const char* number = std::getenv("{FAILURE}");
  return number == nullptr ? cudaSuccess : cudaError_t(std::atoi(number));
}}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {{ return cudaGetLastError(); }}
const char* cudaGetErrorString(cudaError_t error) {{
  switch (error) {{
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorAssert: return "what the kernel does is not allowed on a GPU, see stderr";
    default: return "error";
  }}
}}
// A kernel of Triton's: a function that is given its parameters. Where a libcuda.so.1 is loaded, that launches it.
static int launch_kernel_ex(const void*, void* function, void** parameters, void**) {{
  reinterpret_cast<void (*)(void**)>(function)(parameters);
  return 0;
}}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {{
  void* loaded = dlsym(RTLD_DEFAULT, name);
  *entry = loaded != nullptr ? loaded : reinterpret_cast<void*>(&launch_kernel_ex);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {{ *stream = nullptr; return 0; }}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {{ *guard = nullptr; return 0; }}
int32_t aoti_torch_delete_device_guard(void*) {{ return 0; }}
}}
"""


def why_not() -> str:
    """Why the kernels cannot be built for the CPU here; empty where they can."""
    missing = [tool for tool in ("nvcc", "c++") if not shutil.which(tool)]
    return f"{' and '.join(missing)} not on the PATH" if missing else ""


def translate(source: str, name: str = NAME) -> str:
    """CUDA C++ -> C++: launches become calls, the ops get a name and a device of their own."""
    launch = re.compile(r"([\w:]+(?:<[\w, :()]*>)?)<<<(.*?), 0, stream>>>\((.*?)\);", re.DOTALL)

    def replace(match: re.Match) -> str:
        kernel, sizes, arguments = match.groups()
        grid, block = (part.strip() for part in re.split(r",(?![^()]*\))", sizes))
        if kernel in re.findall(r"void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source) or "<" in kernel:
            return f"cuda_on_cpu::launch(dim3({grid}), dim3({block}), [&] {{ {kernel}({arguments}); }});"
        raise ValueError(f"cuda_on_cpu: cannot read the launch of {kernel}")

    translated = launch.sub(replace, source)
    assert "<<<" not in translated, "a launch was not translated"
    return (
        translated.replace("fastvit_cuda, CUDA, m", f"{name}, CPU, m")
        .replace("fastvit_cuda, Comp", f"{name}, Comp")
        .replace("(fastvit_cuda, m)", f"({name}, m)")
    )


@functools.cache
def library():
    """The ops, built once a process."""
    return _library(PASSES, "cuda", NAME)


@functools.cache
def attention():
    """``attention_fwd`` and ``attention_packed_fwd``, built once a process. See hopper_model.h."""
    return _library(ATTENTION, "cuda/sm90", f"{NAME}_model")  # an op of one name is registered once a process


def cutlass_headers() -> Path | None:
    """Where setup.py finds CUTLASS too."""
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.submodule_search_locations[0]) / "source" / "include" if spec else None


def compile_program(name: str, program: Path, *includes: Path, cuda: bool = False) -> None:
    """A program of this folder, with nvcc's headers and more; ``cuda`` for headers that need its language."""
    flags = ["-std=c++20", "-O0", *(f"-I{path}" for path in (TESTS, *includes))]
    flags += ["-x", "cu", "-arch=sm_90a", "--expt-relaxed-constexpr", "-w"] if cuda else ["-x", "c++", PERMISSIVE]
    run(["nvcc", *flags, str(TESTS / name), "-o", str(program)])


def _library(files: list[Path], folder: str, name: str):
    work = Path(tempfile.mkdtemp(prefix="cuda-on-cpu-"))
    try:
        _build(work, files, work / folder, name)
        torch.ops.load_library(str(work / "library.so"))
    finally:
        shutil.rmtree(work)
    return getattr(torch.ops, name)


def _build(work: Path, files: list[Path], folder: Path, ops: str) -> None:
    folder.mkdir(parents=True)
    (work / "runtime.cpp").write_text(RUNTIME)
    for path in files:
        name = f"{path.name}.cpp" if path.suffix == ".cu" else STANDS_FOR.get(path.name, path.name)
        (folder / name).write_text(translate(path.read_text(), ops))
    includes = [f"-I{work}", f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths())]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    host = "-fPIC,-fpermissive,-w,-include," + str(ROOT / "tests" / "cuda_on_cpu.h")
    base = ["nvcc", "-x", "c++", "-std=c++20", "-O1", *includes, *defines]
    objects = []
    for source in [work / "runtime.cpp", *sorted(folder.glob("*.cpp"))]:
        objects.append(str(work / f"{source.name}.o"))
        flags = [] if source.name in GLUE else [f"-Xcompiler={host}"]
        run([*base, "-Xcompiler=-fPIC", *flags, "-c", str(source), "-o", objects[-1]])
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    run(["c++", "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", str(work / "library.so")])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
