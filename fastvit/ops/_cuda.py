"""LayerNorm, MLP and projection on a GPU: matrix products, and CUDA passes for everything between them.

The same six functions as ``fastvit._C``. ``ops`` are the passes of csrc/cuda, each one trip over memory. On Hopper the
products are csrc/cuda/sm90's with bias, activation, LayerScale and residual in their epilogues; elsewhere, and for what
those do not take (``_sm90.why_not``), PyTorch's with the bias in cuBLAS's epilogue and a pass for the rest. What
products and passes sum (statistics, bias gradients) they sum in float32.

A backward keeps ``x``, its row statistics and fc1's result: LayerNorm's and the activation's results are written once
more by the backward pass that reads their inputs anyway, just before the weight gradients need them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _sm90, _tiles

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
    out, _, mean, rstd = _norm_linear_act(_rows(x), norm_weight, norm_bias, weight, bias, eps, "none", False)
    return out.view(*x.shape[:-1], weight.shape[0]), mean, rstd


def layernorm_linear_bwd(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    mask: list[bool],
    dresidual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, weight, bias; an empty tensor where ``mask`` says no.

    ``dresidual``, like x, is added to x's: the gradient that the residual connection around the branch brings.
    """
    dout, dresidual = _rows(dout), None if dresidual is None else _rows(dresidual)
    dbias = ops.column_sum(dout, weight.dtype) if mask[4] else None
    norm = (x, mean, rstd, norm_weight, norm_bias)
    dx, dnorm_weight, dnorm_bias, dweight = _norm_linear_grads(dout, *norm, weight, dresidual, mask[:4])
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
    tiles = _joined_mlp_tiles(rows, fc1_weight, fc2_weight) if residual else None
    if tiles is not None:
        params = _norm(norm_weight, norm_bias, fc1_weight)
        factors = _readable(layer_scale, fc2_weight), _row_factors(row_scale, rows.shape[0])
        biased = fc1_weight, _dense(fc1_bias), fc2_weight, _dense(fc2_bias)
        out, h, mean, rstd = ops.layernorm_mlp_residual(rows, *params, *biased, *factors, eps, act, save, *tiles)
        return out.view(x.shape), mean, rstd, h
    a, h, mean, rstd = _norm_linear_act(rows, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, act, save)
    to = rows if residual else None
    out = _linear_residual(a, fc2_weight, fc2_bias, to, layer_scale, row_scale, x.dtype)
    return out.view(x.shape), mean, rstd, h


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
    a = dh = dfc1_bias = None
    if wants_fc1:
        sums_dtype = fc1_weight.dtype if mask[4] else None
        dh, a, dfc1_bias = _act_grad(*_scaled(dbranch, fc2_weight, layer_scale), h, act, wants_a, sums_dtype)
    elif wants_a:
        a = torch.empty_like(h)
        ops.act_fwd(h, a, act)
    branch_grads = _weight_grads(dbranch, sums, a, fc2_weight, fc2_bias, layer_scale, mask[5:])
    del a
    norm_grads: tuple[Tensor | None, ...] = (None,) * 4
    if dh is not None:
        norm = (x, mean, rstd, norm_weight, norm_bias)
        norm_grads = _norm_linear_grads(dh, *norm, fc1_weight, dout if residual else None, mask[:4])
    return _given(x, (*norm_grads, dfc1_bias if mask[4] else None, *branch_grads))


def _norm_linear_act(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``act(h), h, mean, rstd`` with ``h = linear(layer_norm(x))``, (M, F), empty without ``save``."""
    params = _norm(norm_weight, norm_bias, weight)
    tile = _joined_tile(x, weight)
    if tile is not None:
        return ops.layernorm_linear_act(x, *params, weight, _dense(bias), eps, act, save, tile)
    y, mean, rstd = ops.layernorm_fwd(x, *params, eps, weight.dtype)
    return *_linear_act(y, weight, bias, act, save), mean, rstd


def _joined_tile(x: Tensor, weight: Tensor) -> str | None:
    """The tile of Hopper's product behind a LayerNorm of x in the same call; None where there is no such call.

    What LayerNorm writes suits any product.
    """
    return _sm90.tile(ops, "linear_act", x.shape[0], weight) if hasattr(ops, "layernorm_linear_act") else None


def _joined_mlp_tiles(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor) -> tuple[str, str] | None:
    """The tiles of fc1 and fc2 where all of ``x + fc2(act(fc1(layer_norm(x))))`` is one call."""
    fc1 = _joined_tile(x, fc1_weight)
    if fc1 is None or fc2_weight.dtype != fc1_weight.dtype:
        return None
    fc2 = _sm90.tile(ops, "linear_residual", x.shape[0], fc2_weight, x)
    return None if fc2 is None else (fc1, fc2)


def _linear_act(y: Tensor, weight: Tensor, bias: Tensor | None, act: str, save: bool) -> tuple[Tensor, Tensor]:
    tile = _sm90.tile(ops, "linear_act", y.shape[0], weight, y=y)
    if tile is not None:
        return ops.linear_act(y, weight, _dense(bias), act, save, tile)
    h = F.linear(y, weight, bias)
    if act == "none":
        return h, h if save else h.new_empty(0)
    a = torch.empty_like(h) if save else h
    ops.act_fwd(h, a, act)
    return a, h if save else h.new_empty(0)


def _act_grad(
    dbranch: Tensor, weight: Tensor, h: Tensor, act: str, wants_a: bool, sums_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``dh = (dbranch @ weight) * act'(h)``, ``act(h)`` once more, and the column sums of ``dh``."""
    if _sm90.takes(ops, weight.shape[1], dbranch=dbranch, weight=weight, h=h):
        dh, a, sums = ops.linear_act_grad(dbranch, weight, h, act, wants_a, sums_dtype, _tiles.ACT_GRAD)
        return dh, a if wants_a else None, sums
    dh = dbranch @ weight
    again = torch.empty_like(h) if wants_a else None
    return dh, again, ops.act_bwd(dh, h, again, act, sums_dtype)


def _rows(x: Tensor) -> Tensor:
    """``x`` as (M, E) with its columns next to each other; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _norm(norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LayerNorm's parameters in one dtype the passes read: the weight's, or float32."""
    norm_weight, norm_bias = _dense(norm_weight), _dense(norm_bias)
    if norm_weight is not None and norm_bias is not None and norm_weight.dtype == norm_bias.dtype == weight.dtype:
        return norm_weight, norm_bias
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
        return _dense(scale)
    return scale.to(_sum_dtype(weight)).contiguous()


def _dense(vector: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it; a copy where it is a column of a matrix or one number expanded."""
    return None if vector is None else vector.contiguous()


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
    x = x if x.dtype == weight.dtype else x.to(weight.dtype)
    tile = None if residual is None else _sm90.tile(ops, "linear_residual", x.shape[0], weight, residual, x=x)
    if tile is not None:
        factors = _readable(layer_scale, weight), _row_factors(row_scale, x.shape[0])
        return ops.linear_residual(x, weight, _dense(bias), residual, *factors, tile)
    plain = layer_scale is None and row_scale is None
    if plain and residual is None:
        return _linear_act(x, weight, bias, "none", False)[0].to(dtype)
    if plain and residual is not None and bias is None and dtype == weight.dtype:
        return torch.addmm(residual, x, weight.t())  # the residual is cuBLAS's beta = 1 term
    scales = _readable(layer_scale, weight), _readable(row_scale, weight)
    return ops.scale_residual_fwd(_linear_act(x, weight, bias, "none", False)[0], residual, *scales, dtype)


def _row_factors(row_scale: Tensor | None, rows: int) -> Tensor | None:
    """One float32 factor a row from one a sample."""
    if row_scale is None or row_scale.numel() == 0:
        return None
    factors = row_scale.new_empty((row_scale.numel(), rows // row_scale.numel()), dtype=torch.float32)
    return factors.copy_(row_scale[:, None]).view(-1)


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
    scaled, weight = _scaled(dbranch, weight, layer_scale)
    return scaled @ weight


def _scaled(dbranch: Tensor, weight: Tensor, layer_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors whose product is ``(dbranch * layer_scale) @ weight``."""
    if layer_scale is None:
        return dbranch, weight
    scale = _readable(layer_scale, weight)
    if (
        weight.dtype == torch.float16
    ):  # a small LayerScale times a weight can fall below float16, times dout as in eager
        return ops.scale(dbranch, None, scale, weight.dtype, None)[0], weight
    return dbranch, ops.scale(_rows(weight), scale, None, weight.dtype, None)[0]


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
        if not wants_bias or sums is None:
            return None, None, None
        return None, ops.scale(sums[None], None, _readable(layer_scale, weight), weight.dtype, None)[0][0], None
    if weight.dtype == torch.float32:
        return _float32_scale_grads(dbranch, sums, inputs, weight, bias, layer_scale, mask)
    scale = _readable(layer_scale, weight)
    g = _float32_product(dbranch.t(), inputs)
    dweight, dbias, dlayer_scale = ops.layer_scale_bwd(g, _rows(weight), _dense(bias), sums, scale)
    return (
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        dlayer_scale.to(layer_scale.dtype) if wants_scale else None,
    )


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of 16-bit factors in float32: divided by a small LayerScale, a gradient may not fit float16."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _float32_scale_grads(
    dbranch: Tensor,
    sums: Tensor | None,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """LayerScale's from the branch, computed once more: read from the weight's it was twice as far off as stock's."""
    wants_weight, wants_bias, wants_scale = mask
    scale = layer_scale.to(weight.dtype)
    dlayer_scale = None
    if wants_scale:
        branch = F.linear(inputs, weight, bias)
        dlayer_scale = ops.column_sum(branch.mul_(dbranch), weight.dtype).to(layer_scale.dtype)
    return (
        (dbranch.t() @ inputs).mul_(scale[:, None]) if wants_weight else None,
        sums * scale if wants_bias and sums is not None else None,
        dlayer_scale,
    )


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
