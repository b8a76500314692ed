"""LayerNorm, MLP and residual: the second half of a ViT block and 63 % of its work."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from .. import reference
from ..dispatch import Op
from . import _contract, _register
from .layernorm_linear import check_norm, check_weight, fake_grads, keep
from .linear_residual import check_branch

NAME = "layernorm_mlp"
MEMORY = ("default", "lean")


def layernorm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    act: str = "gelu",
    eps: float = 1e-6,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: bool = True,
    memory: str = "default",
) -> Tensor:
    """``x + row_scale * layer_scale * fc2(act(fc1(layer_norm(x))))``.

    x                       (B, ..., E)  float32 | bfloat16 | float16, any strides, one device
    norm_weight, norm_bias  (E,)         optional
    fc1_weight, fc1_bias    (F, E), (F,) dtype of x, or a 16-bit dtype under a float32 x (autocast); bias optional
    fc2_weight, fc2_bias    (E, F), (E,) dtype of fc1_weight; bias optional
    act                     "gelu" (exact, erf) | "gelu_tanh" | "quick_gelu"
    layer_scale             (E,)         optional
    row_scale               (B,)         optional; one factor a sample, as DropPath draws them. Gets no gradient
    residual                False leaves out ``x +``
    memory                  "default": for the backward x, the row statistics and fc1's result are kept; LayerNorm and
                            activation are done again. "lean": fc1 too is done again, and its result not kept
    returns                 (B, ..., E)  dtype of x; statistics and sums in float32

    Raises ValueError for a wrong shape, dtype or device, Unsupported where a forced backend cannot run.
    Meaning: fastvit.reference.layernorm_mlp.
    """
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, row_scale)
    return _contract.call(OP, _check, (3, 4, 5, 6), *tensors, act, eps, residual, memory)


def _check(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, row_scale, act, eps, residual,
    memory,
) -> None:  # fmt: skip
    check_norm(NAME, x, norm_weight, norm_bias)
    _contract.check_together(
        NAME,
        "x",
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        layer_scale=layer_scale,
        row_scale=row_scale,
    )
    check_weight(NAME, "fc1_", fc1_weight, fc1_bias, x, x.shape[-1])
    _contract.check_shape(
        NAME, "fc2_weight", fc2_weight, (x.shape[-1], fc1_weight.shape[0]), "like x's width and fc1_weight's rows"
    )
    check_weight(NAME, "fc2_", fc2_weight, fc2_bias, x, fc1_weight.shape[0])
    if _contract.autocast_dtype(x) is None:
        _contract.check_dtype(NAME, "fc2_weight", fc2_weight, (fc1_weight.dtype,), "like fc1_weight")
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"{NAME}: act is {act!r}, expected one of {', '.join(map(repr, reference.ACTIVATIONS))}")
    check_branch(NAME, x, layer_scale, row_scale)
    if memory not in MEMORY:
        raise ValueError(f"{NAME}: memory is {memory!r}, expected one of {', '.join(map(repr, MEMORY))}")


def _fwd(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, save, cache, backend):
    kernels = _contract.compiled(backend)
    return kernels.layernorm_mlp_fwd(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, save, cache)


def _fwd_fake(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, save, cache, backend):
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(rows, dtype=torch.float32)
    hidden = w1.new_empty((rows, w1.shape[0]) if save else (0,))
    return x.new_empty(x.shape), mean, torch.empty_like(mean), hidden


def _bwd(dout, x, mean, rstd, h, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, mask, backend):
    kernels = _contract.compiled(backend)
    if h.numel() == 0 and x.numel() > 0:  # memory="lean"
        h = kernels.layernorm_linear_fwd(x, nw, nb, w1, b1, eps, False)[0].view(-1, w1.shape[0])
    return kernels.layernorm_mlp_bwd(
        dout, x, mean, rstd, h, nw, nb, w1, w2, b2, layer_scale, row_scale, act, residual, mask
    )


def _bwd_fake(
    dout, x, mean, rstd, h, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, mask, backend
):
    return fake_grads(x, mask, (x, nw, nb, w1, b1, w2, b2, layer_scale))


_fwd_op = _register.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight,"
    " Tensor? fc2_bias, Tensor? layer_scale, Tensor? row_scale, str act, float eps, bool residual, bool save,"
    " bool cache, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    "(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor h, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale,"
    " Tensor? row_scale, str act, float eps, bool residual, bool[] mask, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *weights_and_scales = inputs[:9]
    ctx.act, ctx.eps, ctx.residual, _, _, ctx.backend = inputs[9:]
    ctx.save_for_backward(x, *output[1:], *weights_and_scales)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    mask = list(ctx.needs_input_grad[:8])
    if dout is None or not any(mask):
        return (None,) * 15
    grads = _bwd_op(dout, *ctx.saved_tensors, ctx.act, ctx.eps, ctx.residual, mask, ctx.backend)
    return *keep(mask, grads), *(None,) * 7


_INPUTS = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale")
_SETTINGS = ("row_scale", "act", "eps", "residual")
_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_register.register_double_backward(
    f"{NAME}_bwd",
    reference.layernorm_mlp,
    inputs=(*_INPUTS, "row_scale", "act", "eps", "residual"),
    arguments=(
        "dout",
        "x",
        "mean",
        "rstd",
        "h",
        *_INPUTS[1:],
        "row_scale",
        "act",
        "eps",
        "residual",
        "mask",
        "backend",
    ),
)


def _run_compiled(backend: str):
    def run(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, memory="default"):
        arguments = (x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale)
        save = (
            memory == "default"
            and torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in arguments)
        )
        cache = _contract.may_cache(w1, w2)
        return _fwd_op(*arguments, act, eps, residual, save, cache, backend)[0]

    return run


def _run_torch(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, memory="default"):
    run = reference.layernorm_mlp
    if memory == "lean" and torch.is_grad_enabled():
        run = partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return run(
        x,
        nw,
        nb,
        w1,
        b1,
        w2,
        b2,
        act=act,
        eps=eps,
        layer_scale=layer_scale,
        row_scale=row_scale,
        residual=residual,
    )


def _why_not(backend: str):
    def why_not(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, eps, residual, memory="default"):
        return _contract.why_not_compiled(backend, x, w1)

    return why_not


OP = Op(NAME, *_contract.compiled_backends(_run_compiled, _why_not, _run_torch))
