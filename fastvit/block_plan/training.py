"""A block's training in one autograd node: the ops' kernels (``kernels``), one after another, forward and backward.

Each op by itself has a node of its own, checks of its own and a choice of its own, at every call; with a small batch a
GPU waits for that. What is kept for the backward is what the ops keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from ..block_parts import BlockParts, row_scale
from ..ops import _contract, _register
from . import cpp
from .kernels import Step, backward, forward, split
from .plan import Later, Plan, class_token_heads, class_token_linears, empty_heads, parameters

_CAST = (2, 3, 4, 5, 9, 10, 11, 12)  # of ``parameters``, what autocast casts: weights and biases of the linear layers
_HALF = 7  # of ``parameters``, those of the attention's branch


def key(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> tuple:
    """All that the ops' checks and choices depend on."""
    drops = parts.drop_path1 is None, parts.drop_path2 is None
    return "training", drops, _autocast_dtype(x), *cpp.key(parts, x, memory, class_token)


def find_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """From the second call on: the first one is checked by the ops."""
    if x.dim() != 3 or not _wants(x, *parameters(parts)[:_HALF]):
        return None
    chosen: dict[str, Any] = {}
    dtype = _autocast_dtype(x)
    for name, arguments in _op_calls(parts, x, memory, dtype, class_token):
        op = dispatch.OPS[name]
        run = op.settled(_contract.key(op, arguments))
        if run is None:
            raise Later
        chosen[name] = next((kept for kept in op.backends.values() if kept.run is run), None)
    names = tuple(getattr(backend, "name", "") for backend in chosen.values())
    if not {"cuda", "cpp", "triton"}.issuperset(names):
        return None
    num_heads, _, scale = parts.heads
    caches = tuple(_contract.may_cache(*weights) for weights in (parts.qkv[:1], parts.proj[:1], parts.mlp[2:5:2]))
    step = Step(class_token, num_heads, scale, parts.eps1, parts.eps2, parts.act, memory, dtype, caches, names)  # type: ignore[arg-type]
    return Plan(_BlockTraining.apply, (step,), chosen)


def run(plan: Plan, parts: BlockParts, x: Tensor) -> Tensor | None:
    row_scales = row_scale(parts.drop_path1, x), row_scale(parts.drop_path2, x)
    return plan.run(*plan.arguments, *row_scales, x, *parameters(parts))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    return _contract.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None


def _wants(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _op_calls(
    parts: BlockParts, x: Tensor, memory: str, dtype: torch.dtype | None, class_token: bool
) -> list[tuple[str, tuple]]:
    """The ops with arguments such as a block without a plan gives them."""
    (num_heads, _, scale), residual = parts.heads, x[:, :1] if class_token else x
    linears = class_token_linears(x, parts.norm1, parts.qkv) if class_token else ((x, *parts.norm1, *parts.qkv),)
    calls: list[tuple[str, tuple]] = [
        ("layernorm_linear", (*linear, parts.eps1, not class_token)) for linear in linears
    ]
    wants = _wants(x, *parts.norm1, *parts.qkv)
    heads = [t.to(dtype or t.dtype).requires_grad_(wants) for t in empty_heads(parts, x, class_token)]
    if class_token:
        calls.append(("attention", (*heads, None, False, 0.0, scale, None, None, None)))
    else:
        calls.append(("attention_packed", (*heads, num_heads, 0.0, scale, None, None, None)))
    attended = heads[0].new_empty(*residual.shape[:2], parts.qkv[0].shape[0] // 3).requires_grad_(wants)
    middle = residual.detach().contiguous().requires_grad_()
    first, second = (None if drop is None else x.new_empty(len(x)) for drop in (parts.drop_path1, parts.drop_path2))
    mlp = (middle, *parts.mlp, parts.gamma2, second, parts.act, parts.eps2, True, memory)
    return [*calls, ("linear_residual", (attended, *parts.proj, residual, parts.gamma1, first)), ("layernorm_mlp", mlp)]


class _BlockTraining(torch.autograd.Function):
    """(step, row_scale1, row_scale2, x, *parameters) -> what the block makes of x."""

    @staticmethod
    def forward(ctx: Any, step: Step, row_scale1: Tensor | None, row_scale2: Tensor | None, x: Tensor, *given: Any):
        weights = given if step.dtype is None else _with_casts(given, _casts(given, step.dtype))
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = forward(step, row_scale1, row_scale2, x, weights)
        casts = () if step.dtype is None else tuple(weights[at] for at in _CAST)
        ctx.step = step
        ctx.save_for_backward(x, *saved, row_scale1, row_scale2, *given, *casts)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple:
        wants = ctx.needs_input_grad[3:]
        if dout is None:
            return (None,) * (3 + len(wants))
        x, *kept = ctx.saved_tensors
        count = ctx.step.kept
        saved, row_scales, given, casts = kept[:count], kept[count:][:2], kept[count + 2 :][:14], kept[count + 16 :]
        if torch.is_grad_enabled() or _is_watched(dout):
            grads: Any = _by_the_ops_backwards(ctx.step, dout, row_scales, (x, *given), wants)
        else:
            weights = _with_casts(given, casts) if casts else given
            with torch._C._AutoDispatchBelowAutograd():
                grads = backward(ctx.step, dout, x, saved, row_scales, weights, wants)
        return (None,) * 3 + tuple(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))


def _casts(given: Any, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if given[at] is None else given[at].to(dtype) for at in _CAST]


def _with_casts(given: Any, casts: Any) -> list[Tensor | None]:
    weights = list(given)
    for at, cast in zip(_CAST, casts, strict=True):
        weights[at] = cast
    return weights


def _is_watched(dout: Tensor) -> bool:
    """Whether a mode or a transform came between forward and backward, as torch.vmap over gradients does."""
    return _register.is_watched_by_any_mode() or _register.is_batched(dout)


def _by_the_ops_backwards(
    step: Step, dout: Tensor, row_scales: Any, inputs: tuple[Tensor, ...], wants: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same gradients by the four ops, which modes see, and which are differentiable once more."""
    is_differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        known = [t.view_as(t) if wanted else t for t, wanted in zip(inputs, wants, strict=True)]
        with torch.autocast(dout.device.type, step.dtype, enabled=step.dtype is not None):
            out = _by_ops(step, row_scales, *known)
        asked = [t for t, wanted in zip(known, wants, strict=True) if wanted]
        found = iter(torch.autograd.grad(out, asked, dout, create_graph=is_differentiable, allow_unused=True))
    return [next(found) if wanted else None for wanted in wants]


def _by_ops(step: Step, row_scales: Any, x: Tensor, *weights: Any) -> Tensor:
    norm_and_qkv, (weight, bias), scale1, mlp, scale2 = split(weights)
    attended, x = (_attend_class_token if step.class_token else _attend)(step, x, norm_and_qkv)
    x = ops.linear_residual(attended, weight, bias, x, layer_scale=scale1, row_scale=row_scales[0])
    branch: dict[str, Any] = {"layer_scale": scale2, "row_scale": row_scales[1], "memory": step.memory}
    return ops.layernorm_mlp(x, *mlp, act=step.act, eps=step.eps2, **branch)


def _attend(step: Step, x: Tensor, norm_and_qkv: Any) -> tuple[Tensor, Tensor]:
    qkv, x = ops.layernorm_linear(x, *norm_and_qkv, eps=step.eps1, with_input=True)
    return ops.attention_packed(qkv, step.num_heads, scale=step.scale), x


def _attend_class_token(step: Step, x: Tensor, norm_and_qkv: Any) -> tuple[Tensor, Tensor]:
    linears = class_token_linears(x, norm_and_qkv[:2], norm_and_qkv[2:])
    q, kv = (ops.layernorm_linear(*linear, eps=step.eps1) for linear in linears)
    attended = ops.attention(*class_token_heads(q, kv, step.num_heads), scale=step.scale)
    return attended.transpose(1, 2).flatten(2), x[:, :1]
