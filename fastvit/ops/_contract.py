"""Checks and conversions that the ops share. Errors name the tensor, the rule and what came."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _extension, packs
from ..dispatch import Backend, Op
from ..reference import HeadNorm, Rope
from . import _register

# asked once: torch.compile of PyTorch 2.11 cannot trace the question
AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(op: Op, check: Callable[..., None], cast_at: tuple[int, ...], *args: Any) -> Any:
    """Check ``args``, cast those at ``cast_at`` as autocast wants, run the op.

    What was checked once is not checked again: a call is known by what all checks, casts and choices depend on.
    """
    known = None if torch.compiler.is_compiling() else key(op, args)
    run = op.settled(known)
    if run is None:
        check(*args)
    dtype = autocast_dtype(args[0]) if known is None else known[1]
    if dtype is not None:
        args = tuple(
            arg.to(dtype) if at in cast_at and arg is not None else arg  # type: ignore[union-attr]
            for at, arg in enumerate(args)
        )
    return op(*args, key=known) if run is None else run(*args)


def key(op: Op, args: tuple) -> tuple | None:
    """What checks, casts and the choice of a backend depend on; None where it cannot be told."""
    if _register.is_transformed():
        return None
    dtype = autocast_dtype(args[0]) if torch._C._is_any_autocast_enabled() else None
    facts: list[Any] = [op.choice, dtype]
    return tuple(facts) if add_facts(facts, args) else None


def add_facts(facts: list[Any], args: tuple) -> bool:
    """Append what is known of ``args`` but their values; False where that is not all."""
    for arg in args:
        kind = type(arg)
        if kind is Parameter or kind is Tensor:
            facts += (arg.shape, arg.dtype, arg.device, arg.requires_grad)
        elif kind in _NUMBERS:
            facts.append(arg)
        elif kind is HeadNorm or kind is Rope:
            facts.append(kind)
            if not add_facts(facts, arg):
                return False
        else:
            return False
    return True


_NUMBERS = frozenset((type(None), bool, int, float, str))


def check_shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], like: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected} {like}")


def check_rank(op: str, name: str, tensor: Tensor, least: int, letters: str) -> None:
    if tensor.dim() < least:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {letters}")


def check_together(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """All floating point, and on the device of ``first``."""
    if not first.is_floating_point():
        raise ValueError(f"{op}: {first_name} is {first.dtype}, expected a floating point dtype")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first.device} like {first_name}")
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected a floating point dtype")


def check_dtype(op: str, name: str, tensor: Tensor | None, allowed: tuple[torch.dtype, ...], like: str) -> None:
    if tensor is not None and tensor.dtype not in allowed:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {expected} {like}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on ``x``'s device, or None when it is off."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in AUTOCAST_DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` in ``dtype``; as they are when it is None."""
    if dtype is None:
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def may_cache(*weights: Tensor | None) -> bool:
    """Packed copies of weights are kept where they are wanted, unless an optimiser is about to change the weights."""
    trained = torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)
    return packs.are_kept() and not trained


def why_not_device(backend: str, device_type: str, x: Tensor) -> list[str]:
    if x.device.type != device_type:
        return [f"the tensors are on {x.device}, {backend} runs on {device_type}"]
    return []


def why_not_dtype(name: str, x: Tensor) -> list[str]:
    if x.dtype not in KERNEL_DTYPES:
        return [f"{name} is {x.dtype}, the kernels take float32, bfloat16 and float16"]
    return []


def why_not_transformed() -> list[str]:
    """A custom op drops the tangents of forward-mode differentiation without a word."""
    if _register.is_transformed():
        return ["torch.func or forward-mode differentiation transforms the call, for which the kernels have no rules"]
    return []


def why_not_compiled(backend: str, x: Tensor, weight: Tensor, name: str = "x") -> list[str]:
    """Reasons against the C++ ("cpp") or CUDA ("cuda") kernels; ``name`` is that of ``x``."""
    built, device_type = {
        "cpp": (_extension.why_not_cpp, "cpu"),
        "cuda": (_extension.why_not_cuda, "cuda"),
    }[backend]
    reasons = built() + why_not_device(backend, device_type, x)
    if backend == "cuda" and not reasons and (no_kernels := _extension.why_not_card(x.device.index)):
        reasons.append(no_kernels)
    reasons += why_not_dtype(name, x) + why_not_transformed()
    return reasons if weight.dtype == x.dtype else reasons + why_not_dtype("the weight", weight)


def why_not_triton(name: str, x: Tensor) -> list[str]:
    reasons = _extension.why_not_triton()
    if x.device.type != "cuda" and not (_extension.TRITON_INTERPRETED and x.device.type == "cpu"):
        reasons.append(f"the tensors are on {x.device}, triton runs on cuda (or anywhere under TRITON_INTERPRET=1)")
    return reasons + why_not_dtype(name, x) + why_not_transformed()


@cache
def compiled(backend: str) -> ModuleType:
    """What holds the LayerNorm and MLP kernels of ``backend``: both offer the same functions."""
    if backend == "cuda":
        from . import _cuda

        return _cuda
    assert _extension.CPP is not None, "dispatch checked that the extension is loaded"
    return _extension.CPP


def compiled_backends(run: Callable[[str], Callable], why_not: Callable[[str], Callable], plain: Callable):
    """Backends of an op whose kernels are compiled, in order of preference; ``run`` and ``why_not`` take a name."""
    return (
        Backend("cuda", run("cuda"), why_not("cuda"), ("cuda",)),
        Backend("cpp", run("cpp"), why_not("cpp"), ("cpu",)),
        Backend("torch", plain),
        Backend("reference", plain),
    )
