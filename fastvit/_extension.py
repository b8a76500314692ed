"""Load the compiled parts once, and keep the reason when they cannot be loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).resolve().parent


def _load_cpp() -> tuple[ModuleType | None, list[str]]:
    try:
        return importlib.import_module("fastvit._C"), []
    except ImportError as error:
        if importlib.util.find_spec("fastvit._C") is None:
            return None, ["the C++ extension is not built (install with a C++ compiler, without FASTVIT_SKIP_BUILD)"]
        return None, [f"the C++ extension does not load: {error}"]


def _load_cuda() -> tuple[bool, list[str]]:
    if torch.version.cuda is None:
        return False, ["this torch is built without CUDA"]
    libraries = sorted(_HERE.glob("_cuda*.so"))
    if not libraries:
        return False, ["the CUDA library is not built (install where nvcc is on the PATH)"]
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return False, [f"the CUDA library does not load: {error.__cause__ or error}"]
    return True, []


def _find_triton() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    return []


CPP, WHY_NOT_CPP = _load_cpp()
_CUDA_LOADED, WHY_NOT_CUDA = _load_cuda()
WHY_NOT_TRITON = _find_triton()
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def cpp() -> ModuleType | None:
    """The pybind11 module ``fastvit._C``, or None; see ``why_not_cpp``."""
    return CPP


def why_not_cpp() -> list[str]:
    return list(WHY_NOT_CPP)


def why_not_cuda() -> list[str]:
    return list(WHY_NOT_CUDA)


def why_not_card(index: int) -> str:
    """Why the CUDA library, which is loaded, does not run on this device; empty where it does."""
    return _ask_card(index)


# torch.compiler.assume_constant_result, which would import the compiler
why_not_card._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _ask_card(index: int) -> str:
    reason = torch.ops.fastvit_cuda.why_not_device(index)
    return reason and f"the CUDA library has no kernels for cuda:{index} ({reason})"


def why_not_triton() -> list[str]:
    return list(WHY_NOT_TRITON)
