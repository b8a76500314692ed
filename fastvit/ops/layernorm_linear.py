"""LayerNorm and the linear layer behind it: the first half of a ViT block's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import Op
from . import _contract, _register

NAME = "layernorm_linear"


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    with_input: bool = False,
) -> Any:
    """``linear(layer_norm(x))``, for example LN1 and the qkv projection.

    x                       (..., E)   float32 | bfloat16 | float16, any strides, one device
    norm_weight, norm_bias  (E,)       optional
    weight                  (O, E)     dtype of x, or a 16-bit dtype under a float32 x (autocast)
    bias                    (O,)       optional, dtype of weight
    with_input              True returns (out, x): x for the residual connection around the branch that starts here.
                            LayerNorm's backward adds the gradient that comes back through it, instead of a pass
    returns                 (..., O)   dtype of weight; statistics and sums in float32

    Raises ValueError for a wrong shape, dtype or device, Unsupported where a forced backend cannot run.
    Meaning: fastvit.reference.layernorm_linear.
    """
    return _contract.call(OP, _check, (3, 4), x, norm_weight, norm_bias, weight, bias, eps, with_input)


def check_norm(op: str, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    """The LayerNorm half of the contract."""
    _contract.check_rank(op, "x", x, 1, "(..., E)")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected a width of at least 1")
    width = (x.shape[-1],)
    _contract.check_shape(op, "norm_weight", norm_weight, width, "like the last dim of x")
    _contract.check_shape(op, "norm_bias", norm_bias, width, "like the last dim of x")


def check_weight(op: str, name: str, weight: Tensor, bias: Tensor | None, x: Tensor, width: int) -> None:
    """A linear layer's weight (O, ``width``) and bias (O,), in a dtype that fits x."""
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{op}: {name}weight has shape {tuple(weight.shape)}, expected (O, {width})")
    _contract.check_shape(op, f"{name}bias", bias, (weight.shape[0],), f"like {name}weight's rows")
    halves = (torch.bfloat16, torch.float16) if x.dtype == torch.float32 else ()
    if _contract.autocast_dtype(x) is None:
        _contract.check_dtype(op, f"{name}weight", weight, (x.dtype, *halves), "like x")
        _contract.check_dtype(op, f"{name}bias", bias, (weight.dtype,), f"like {name}weight")


def _check(x, norm_weight, norm_bias, weight, bias, eps, with_input) -> None:
    check_norm(NAME, x, norm_weight, norm_bias)
    _contract.check_together(NAME, "x", x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    check_weight(NAME, "", weight, bias, x, x.shape[-1])


def _fwd(x, norm_weight, norm_bias, weight, bias, eps, cache, backend):
    kernels = _contract.compiled(backend)
    return kernels.layernorm_linear_fwd(x, norm_weight, norm_bias, weight, bias, eps, cache)


def _fwd_fake(x, norm_weight, norm_bias, weight, bias, eps, cache, backend):
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=torch.float32)
    out = weight.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, statistics, torch.empty_like(statistics)


def _bwd(dout, x, mean, rstd, norm_weight, norm_bias, weight, bias, dresidual, mask, eps, backend):
    kernels = _contract.compiled(backend)
    given = (dout, x, mean, rstd, norm_weight, norm_bias, weight, mask)
    if dresidual is None or not mask[0]:
        return kernels.layernorm_linear_bwd(*given)
    if backend == "cuda":
        return kernels.layernorm_linear_bwd(*given, dresidual)
    dx, *others = kernels.layernorm_linear_bwd(*given)
    return dx.add_(dresidual), *others


def _bwd_fake(dout, x, mean, rstd, norm_weight, norm_bias, weight, bias, dresidual, mask, eps, backend):
    return fake_grads(x, mask, (x, norm_weight, norm_bias, weight, bias))


def fake_grads(some: Tensor, mask: list[bool], likes: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What a backward returns: a dense gradient where one is wanted, an empty tensor like ``some`` elsewhere."""
    return tuple(
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if wanted and like is not None
        else some.new_empty(0)
        for wanted, like in zip(mask, likes, strict=True)
    )


_fwd_op = _register.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps, bool cache,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    "(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor? norm_weight, Tensor? norm_bias, Tensor weight,"
    " Tensor? bias, Tensor? dresidual, bool[] mask, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, norm_weight, norm_bias, weight, bias, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(x, output[1], output[2], norm_weight, norm_bias, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    mask = list(ctx.needs_input_grad[:5])
    if dout is None or not any(mask):
        return (None,) * 8
    grads = _bwd_op(dout, *ctx.saved_tensors, None, mask, ctx.eps, ctx.backend)
    return *keep(mask, grads), None, None, None


class _WithInput(torch.autograd.Function):
    """The op beside its own input, which the residual connection takes up: both gradients of x meet here."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, cache, backend):
        out, mean, rstd = _fwd_op(x, norm_weight, norm_bias, weight, bias, eps, cache, backend)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight, bias)
        ctx.eps, ctx.backend = eps, backend
        ctx.set_materialize_grads(False)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx, dout, dresidual):
        mask = list(ctx.needs_input_grad[:5])
        if dout is None:
            return dresidual, *(None,) * 7
        added = None if torch.is_grad_enabled() else dresidual  # a second derivative needs the sum in the graph
        dx, *others = keep(mask, _bwd_op(dout, *ctx.saved_tensors, added, mask, ctx.eps, ctx.backend))
        if added is None and dresidual is not None and dx is not None:
            dx = dx + dresidual
        return dx, *others, None, None, None


def keep(mask: list[bool], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, None in the other places."""
    return tuple(grad if wanted else None for wanted, grad in zip(mask, grads, strict=True))


_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_register.register_double_backward(
    f"{NAME}_bwd",
    reference.layernorm_linear,
    inputs=("x", "norm_weight", "norm_bias", "weight", "bias", "eps"),
    arguments=(
        "dout",
        "x",
        "mean",
        "rstd",
        "norm_weight",
        "norm_bias",
        "weight",
        "bias",
        "dresidual",
        "mask",
        "eps",
        "backend",
    ),
)


def _run_compiled(backend: str):
    def run(x, norm_weight, norm_bias, weight, bias, eps, with_input=False):
        given = (x, norm_weight, norm_bias, weight, bias, eps, _contract.may_cache(weight), backend)
        if with_input and torch.is_grad_enabled() and x.requires_grad:
            return _WithInput.apply(*given)
        out = _fwd_op(*given)[0]
        return (out, x) if with_input else out

    return run


def _run_torch(x, norm_weight, norm_bias, weight, bias, eps, with_input=False):
    out = reference.layernorm_linear(x, norm_weight, norm_bias, weight, bias, eps=eps)
    return (out, x) if with_input else out


def _why_not(backend: str):
    def why_not(x, norm_weight, norm_bias, weight, bias, eps, with_input=False):
        return _contract.why_not_compiled(backend, x, weight)

    return why_not


OP = Op(NAME, *_contract.compiled_backends(_run_compiled, _why_not, _run_torch))
