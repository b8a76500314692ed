"""LayerNorm, MLP and projection on a GPU: cuBLAS products, and CUDA passes for everything between them.

The same six functions as ``fastvit._C``. ``ops`` are the passes of csrc/cuda, each one trip over memory; the products
are PyTorch's, with the bias in cuBLAS's epilogue. What the passes sum (statistics, bias gradients) they sum in float32.

A backward keeps ``x``, its row statistics and fc1's result: LayerNorm's and the activation's results are written once
more by the backward pass that reads their inputs anyway, just before the weight gradients need them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops.fastvit_cuda


def layernorm_linear_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    cache: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out (..., O)`` in weight's dtype; ``mean, rstd (M,)``."""
    y, mean, rstd = ops.layernorm_fwd(_rows(x), *_norm(norm_weight, norm_bias, weight), eps, weight.dtype)
    return F.linear(y, weight, bias).view(*x.shape[:-1], weight.shape[0]), mean, rstd


def layernorm_linear_bwd(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, weight, bias; an empty tensor where ``mask`` says no."""
    dout = _rows(dout)
    dbias = ops.column_sum(dout, weight.dtype) if mask[4] else None
    norm = (x, mean, rstd, norm_weight, norm_bias)
    dx, dnorm_weight, dnorm_bias, dweight = _norm_linear_grads(dout, *norm, weight, None, mask[:4])
    return _given(x, (dx, dnorm_weight, dnorm_bias, dweight, dbias))


def linear_residual_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    cache: bool,
) -> Tensor:
    """``out (..., O)`` in residual's dtype."""
    out = _linear_residual(_rows(x), weight, bias, _rows(residual), layer_scale, row_scale, residual.dtype)
    return out.view(residual.shape)


def linear_residual_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, layer_scale; residual's is ``dout`` itself."""
    dbranch, sums = _branch_grad(_rows(dout), weight, layer_scale, row_scale, mask[2] or mask[3])
    dx = _input_grad(dbranch, weight, layer_scale).view(x.shape).to(x.dtype) if mask[0] else None
    inputs = _rows(x).to(weight.dtype)
    return _given(x, (dx, *_weight_grads(dbranch, sums, inputs, weight, bias, layer_scale, mask[1:])))


def layernorm_mlp_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    act: str,
    eps: float,
    residual: bool,
    save: bool,
    cache: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out (..., E)`` in x's dtype; ``mean, rstd (M,)``; ``h (M, F)``, fc1's result, empty without ``save``."""
    rows = _rows(x)
    y, mean, rstd = ops.layernorm_fwd(rows, *_norm(norm_weight, norm_bias, fc1_weight), eps, fc1_weight.dtype)
    h = F.linear(y, fc1_weight, fc1_bias)
    del y
    a = torch.empty_like(h) if save else h
    ops.act_fwd(h, a, act)
    to = rows if residual else None
    out = _linear_residual(a, fc2_weight, fc2_bias, to, layer_scale, row_scale, x.dtype)
    return out.view(x.shape), mean, rstd, h if save else h.new_empty(0)


def layernorm_mlp_bwd(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    act: str,
    residual: bool,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale."""
    dout = _rows(dout)
    wants_fc1, wants_a = any(mask[:5]), mask[5] or mask[7]
    dbranch, sums = _branch_grad(dout, fc2_weight, layer_scale, row_scale, mask[6] or mask[7])
    a = torch.empty_like(h) if wants_a else None
    dh = dfc1_bias = None
    if wants_fc1:
        dh = _input_grad(dbranch, fc2_weight, layer_scale)
        dfc1_bias = ops.act_bwd(dh, h, a, act, fc1_weight.dtype if mask[4] else None)
    elif a is not None:
        ops.act_fwd(h, a, act)
    branch_grads = _weight_grads(dbranch, sums, a, fc2_weight, fc2_bias, layer_scale, mask[5:])
    del a
    norm_grads: tuple[Tensor | None, ...] = (None,) * 4
    if dh is not None:
        norm = (x, mean, rstd, norm_weight, norm_bias)
        norm_grads = _norm_linear_grads(dh, *norm, fc1_weight, dout if residual else None, mask[:4])
    return _given(x, (*norm_grads, dfc1_bias if mask[4] else None, *branch_grads))


def _rows(x: Tensor) -> Tensor:
    """``x`` as (M, E) with its columns next to each other; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _norm(norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LayerNorm's parameters in one dtype the passes read: the weight's, or float32."""
    dtypes = {t.dtype for t in (norm_weight, norm_bias) if t is not None}
    if dtypes <= {weight.dtype} or dtypes <= {torch.float32}:
        return norm_weight, norm_bias
    wide = _sum_dtype(weight)
    return None if norm_weight is None else norm_weight.to(wide), None if norm_bias is None else norm_bias.to(wide)


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _readable(scale: Tensor | None, weight: Tensor) -> Tensor | None:
    """A LayerScale or row scale in a dtype the passes read."""
    if scale is None or scale.dtype in (weight.dtype, torch.float32):
        return scale
    return scale.to(_sum_dtype(weight))


def _linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``residual + row_scale * layer_scale * linear(x)``, (M, O) in ``dtype``."""
    x = x.to(weight.dtype)
    plain = layer_scale is None and row_scale is None
    if plain and residual is None:
        return F.linear(x, weight, bias).to(dtype)
    if plain and residual is not None and bias is None and dtype == weight.dtype:
        return torch.addmm(residual, x, weight.t())  # the residual is cuBLAS's beta = 1 term
    scales = _readable(layer_scale, weight), _readable(row_scale, weight)
    return ops.scale_residual_fwd(F.linear(x, weight, bias), residual, *scales, dtype)


def _branch_grad(
    dout: Tensor, weight: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``dout * row_scale`` in weight's dtype, and its column sums. LayerScale is left to the smaller weight."""
    sums_dtype = weight.dtype if layer_scale is None else _sum_dtype(weight)
    if row_scale is None and dout.dtype == weight.dtype:
        return dout, ops.column_sum(dout, sums_dtype) if wants_sums else None
    scale = _readable(row_scale, weight)
    dbranch, sums = ops.scale(dout, scale, None, weight.dtype, sums_dtype if wants_sums else None)
    return dbranch, sums if wants_sums else None


def _input_grad(dbranch: Tensor, weight: Tensor, layer_scale: Tensor | None) -> Tensor:
    """``(dbranch * layer_scale) @ weight``."""
    if layer_scale is None:
        return dbranch @ weight
    scale = _readable(layer_scale, weight)
    if (
        weight.dtype == torch.float16
    ):  # a small LayerScale times a weight can fall below float16; times dout as in eager
        return ops.scale(dbranch, None, scale, weight.dtype, None)[0] @ weight
    return dbranch @ ops.scale(weight, scale, None, weight.dtype, None)[0]


def _weight_grads(
    dbranch: Tensor,
    sums: Tensor | None,
    inputs: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and layer_scale.

    LayerScale's needs no second look at the branch: with g = dbranch^T inputs, it is <weight_j, g_j> + bias_j sums_j.
    """
    wants_weight, wants_bias, wants_scale = mask
    if layer_scale is None:
        dweight = dbranch.t() @ inputs if wants_weight and inputs is not None else None
        return dweight, sums if wants_bias else None, None
    if inputs is None or not (wants_weight or wants_scale):
        dbias = (sums * layer_scale).to(weight.dtype) if wants_bias and sums is not None else None
        return None, dbias, None
    g = _float32_product(dbranch.t(), inputs)
    scale = _readable(layer_scale, weight)
    dweight, dbias, dlayer_scale = ops.layer_scale_bwd(g, weight, bias, sums, scale)
    return (
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        dlayer_scale.to(layer_scale.dtype) if wants_scale else None,
    )


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with float32 results: divided by a small LayerScale, a gradient may not fit float16."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _norm_linear_grads(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    dresidual: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, norm_weight, norm_bias and weight in ``linear(layer_norm(x))``; ``dresidual`` is added to dx."""
    if not any(mask):
        return (None,) * 4
    params = _norm(norm_weight, norm_bias, weight)
    wants_params, wants_y = mask[1] or mask[2], mask[3]
    dx, dnorm_weight, dnorm_bias, y = ops.layernorm_bwd(
        dout @ weight, _rows(x), mean, rstd, *params, dresidual, wants_params, wants_y
    )
    return (
        dx.view(x.shape) if mask[0] else None,
        dnorm_weight.to(norm_weight.dtype) if mask[1] and norm_weight is not None else None,
        dnorm_bias.to(norm_bias.dtype) if mask[2] and norm_bias is not None else None,
        dout.t() @ y if mask[3] else None,
    )


def _given(like: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)
