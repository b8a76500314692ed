"""A linear layer and the residual it is added to: the attention projection, with LayerScale and DropPath inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..dispatch import Op
from . import _contract, _register
from .layernorm_linear import check_weight, fake_grads, keep

NAME = "linear_residual"


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``residual + row_scale * layer_scale * linear(x)``.

    x            (B, ..., E)  float32 | bfloat16 | float16, any strides, one device
    weight       (O, E)       dtype of x
    bias         (O,)         optional, dtype of weight
    residual     (B, ..., O)  dtype of x, or float32 (autocast keeps the residual stream in it)
    layer_scale  (O,)         optional
    row_scale    (B,)         optional; one factor a sample, as DropPath draws them. Gets no gradient
    returns      (B, ..., O)  dtype of residual; sums in float32

    Raises ValueError for a wrong shape, dtype or device, Unsupported where a forced backend cannot run.
    Meaning: fastvit.reference.linear_residual.
    """
    return _contract.call(OP, _check, (0, 1, 2), x, weight, bias, residual, layer_scale, row_scale)


def check_branch(op: str, out: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> None:
    """LayerScale and row scale fit the output they multiply."""
    _contract.check_shape(op, "layer_scale", layer_scale, (out.shape[-1],), "like the last dim of the output")
    if row_scale is not None and out.dim() < 2:
        raise ValueError(f"{op}: row_scale needs a batch dimension, the output has shape {tuple(out.shape)}")
    _contract.check_shape(op, "row_scale", row_scale, (out.shape[0],), "like the batch")
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError(f"{op}: row_scale requires a gradient, expected a plain factor a sample (it gets none)")


def _check(x, weight, bias, residual, layer_scale, row_scale) -> None:
    _contract.check_rank(NAME, "x", x, 1, "(..., E)")
    _contract.check_together(
        NAME, "x", x, weight=weight, bias=bias, residual=residual, layer_scale=layer_scale, row_scale=row_scale
    )
    check_weight(NAME, "", weight, bias, x, x.shape[-1])
    _contract.check_shape(NAME, "residual", residual, (*x.shape[:-1], weight.shape[0]), "like x and weight's rows")
    check_branch(NAME, residual, layer_scale, row_scale)


def _fwd(x, weight, bias, residual, layer_scale, row_scale, cache, backend):
    kernels = _contract.compiled(backend)
    return kernels.linear_residual_fwd(x, weight, bias, residual, layer_scale, row_scale, cache)


def _fwd_fake(x, weight, bias, residual, layer_scale, row_scale, cache, backend):
    return residual.new_empty(residual.shape)


def _bwd(dout, x, weight, bias, layer_scale, row_scale, mask, backend):
    kernels = _contract.compiled(backend)
    return kernels.linear_residual_bwd(dout, x, weight, bias, layer_scale, row_scale, mask)


def _bwd_fake(dout, x, weight, bias, layer_scale, row_scale, mask, backend):
    return fake_grads(x, mask, (x, weight, bias, layer_scale))


_fwd_op = _register.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, Tensor? row_scale, bool cache,"
    " str backend) -> Tensor",
    _fwd,
    _fwd_fake,
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? row_scale, bool[] mask,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, _, layer_scale, row_scale, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, layer_scale, row_scale)


def _backward(ctx: Any, dout: Tensor) -> tuple:
    x_wants, weight_wants, bias_wants, residual_wants, scale_wants = ctx.needs_input_grad[:5]
    mask = [x_wants, weight_wants, bias_wants, scale_wants]
    grads: tuple = (None,) * 4
    if any(mask):
        grads = keep(mask, _bwd_op(dout, *ctx.saved_tensors, mask, ctx.backend))
    return *grads[:3], dout if residual_wants else None, grads[3], None, None, None


_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)


def _branch(x, weight, bias, layer_scale, row_scale):
    out = reference.F.linear(x, weight, bias)
    return reference.add_branch(out.new_zeros(()), out, layer_scale, row_scale)


_register.register_double_backward(
    f"{NAME}_bwd",
    _branch,
    inputs=("x", "weight", "bias", "layer_scale", "row_scale"),
    arguments=("dout", "x", "weight", "bias", "layer_scale", "row_scale", "mask", "backend"),
)


def _run_compiled(backend: str):
    def run(x, weight, bias, residual, layer_scale, row_scale):
        cache = _contract.may_cache(weight)
        return _fwd_op(x, weight, bias, residual, layer_scale, row_scale, cache, backend)

    return run


def _run_torch(x, weight, bias, residual, layer_scale, row_scale):
    return reference.linear_residual(x, weight, bias, residual, layer_scale=layer_scale, row_scale=row_scale)


def _why_not(backend: str):
    def why_not(x, weight, bias, residual, layer_scale, row_scale):
        reasons = _contract.why_not_compiled(backend, x, weight)
        if residual.dtype not in (x.dtype, reference.torch.float32):
            reasons.append(f"residual is {residual.dtype}, the kernels add to {x.dtype} or float32")
        return reasons

    return why_not


OP = Op(NAME, *_contract.compiled_backends(_run_compiled, _why_not, _run_torch))
