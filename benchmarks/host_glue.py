"""The glue of csrc/cuda for benchmarks/host.py: real checks, allocations and dispatch on CPU tensors, empty launches.

Built as tests/cuda_on_cpu.py builds the whole of csrc/cuda. Needs nvcc's headers and a C++ compiler, no GPU.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import cuda_on_cpu  # noqa: E402

GLUE = ("layernorm_mlp.cpp", "sm90/ops.cpp", "sm90/block.cpp", "sm90/block_bwd.cpp")
PASSES = ("LayerNormFwd", "LayerNormBwd", "ActFwd", "ActBwd", "ScaleResidualFwd", "Scale", "SumPartials")
PASSES += ("LayerScaleBwd",)
HALVES, TILES = ("kBFloat16", "kFloat16"), ("kLarge", "kSmall")

# PyTorch has it on a GPU alone. On others its result is as empty as a launch's
FLOAT32_PRODUCT = """
#include <torch/csrc/stable/library.h>
#include "cuda/glue.h"
namespace fastvit {
Tensor mm(Tensor a, Tensor b, ScalarType dtype) { return empty(a, {a.size(0), b.size(1)}, dtype); }
}
STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("mm.dtype", TORCH_BOX(&fastvit::mm)); }
"""


def why_not() -> str:
    return cuda_on_cpu.why_not()


def empty_launches() -> str:
    """C++: every launcher that the glue calls, doing nothing."""

    def launcher(params: str, name: str, values: str = "") -> str:
        template = "template <> " if values else ""
        return f"{template}cudaError_t launch_{name}{values}(const {params}&, cudaStream_t) {{ return cudaSuccess; }}"

    def snake(name: str) -> str:
        words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_")
        return words.replace("layer_norm", "layernorm")

    lines = ['#include "cuda/sm90/attention.h"', '#include "cuda/sm90/gemm.h"', "namespace fastvit {"]
    lines += [launcher(params, snake(params)) for params in PASSES]
    lines += ["cudaError_t has_kernels() { return cudaSuccess; }"]
    lines += [
        "int layernorm_bwd_groups(const LayerNormBwd&) { return 1; }",
        "int pass_groups(int64_t, int64_t) { return 1; }",
    ]
    lines += ["namespace sm90 {"]
    for half, tile in product(HALVES, TILES):
        values = f"DType::{half}, Tile::{tile}"
        lines.append(launcher("LinearAct", "linear_act", f"<{values}>"))
        lines.append(launcher("LinearActGrad", "linear_act_grad", f"<{values}>"))
        streams = (half, "kFloat32")
        lines += [launcher("LinearResidual", "linear_residual", f"<{values}, DType::{s}>") for s in streams]
    for way in ("Fwd", "Bwd"):
        lines += [launcher(f"Attention{way}", f"attention_{way.lower()}", f"<DType::{half}>") for half in HALVES]
    return "\n".join([*lines, "}", "}", ""])


@cache
def ops() -> Any:
    """``torch.ops.fastvit_cuda`` for CPU tensors, without its kernels."""
    work = Path(tempfile.mkdtemp(prefix="host-glue-"))
    try:
        _build(work)
        torch.ops.load_library(str(work / "library.so"))
    finally:
        shutil.rmtree(work)
    return getattr(torch.ops, cuda_on_cpu.NAME)


def _build(work: Path) -> None:
    sources = {"runtime.cpp": cuda_on_cpu.RUNTIME, "launches.cpp": empty_launches(), "mm.cpp": FLOAT32_PRODUCT}
    sources |= {Path(name).name: cuda_on_cpu.translate((ROOT / "csrc" / "cuda" / name).read_text()) for name in GLUE}
    objects = []
    for name, text in sources.items():
        (work / name).write_text(text)
        objects.append(str(work / f"{name}.o"))
        includes = [f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths())]
        flags = ["-x", "c++", "-std=c++20", "-O2", "-Xcompiler=-fPIC", "-DUSE_CUDA"]
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *includes]
        cuda_on_cpu.run(["nvcc", *flags, "-c", str(work / name), "-o", objects[-1]])
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    cuda_on_cpu.run(["c++", "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", str(work / "library.so")])
