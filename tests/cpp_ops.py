"""The compiled CPU ops as differentiable functions with the signatures of ``fastvit.reference``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")


def poison() -> None:
    """Leave NaN in memory that the next allocations are likely to reuse."""
    for size in (64, 1024, 16384, 262144):
        torch.full((size,), float("nan"))


def filled(grads: tuple[Tensor, ...], mask: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))


class LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, cache):
        poison()
        out, mean, rstd = C.layernorm_linear_fwd(x, norm_weight, norm_bias, weight, bias, eps, cache)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        return out

    @staticmethod
    def backward(ctx, dout):
        poison()
        mask = list(ctx.needs_input_grad[:5])
        return *filled(C.layernorm_linear_bwd(dout, *ctx.saved_tensors, mask), mask), None, None


class LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, layer_scale, row_scale, cache):
        poison()
        ctx.save_for_backward(x, weight, bias, layer_scale, row_scale)
        return C.linear_residual_fwd(x, weight, bias, residual, layer_scale, row_scale, cache)

    @staticmethod
    def backward(ctx, dout):
        poison()
        needs = ctx.needs_input_grad
        mask = [needs[0], needs[1], needs[2], needs[4]]
        dx, dweight, dbias, dscale = filled(C.linear_residual_bwd(dout, *ctx.saved_tensors, mask), mask)
        return dx, dweight, dbias, dout if needs[3] else None, dscale, None, None


class LayerNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, cache):
        poison()
        out, mean, rstd, h = C.layernorm_mlp_fwd(
            x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, True, cache
        )
        ctx.save_for_backward(x, mean, rstd, h, nw, nb, w1, w2, b2, layer_scale, row_scale)
        ctx.options = act, residual
        return out

    @staticmethod
    def backward(ctx, dout):
        poison()
        mask = list(ctx.needs_input_grad[:8])
        grads = C.layernorm_mlp_bwd(dout, *ctx.saved_tensors, *ctx.options, mask)
        return *filled(grads, mask), None, None, None, None, None


def layernorm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-6, cache=False) -> Tensor:
    return LayerNormLinear.apply(x, norm_weight, norm_bias, weight, bias, eps, cache)


def linear_residual(x, weight, bias, residual, *, layer_scale=None, row_scale=None, cache=False) -> Tensor:
    return LinearResidual.apply(x, weight, bias, residual, layer_scale, row_scale, cache)


def layernorm_mlp(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, act="gelu", eps=1e-6, layer_scale=None,
    row_scale=None, residual=True, cache=False,
) -> Tensor:  # fmt: skip
    return LayerNormMlp.apply(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, row_scale, act, eps,
        residual, cache,
    )  # fmt: skip
