"""A block's training in one autograd node: the four ops' kernels, one after another, forward and backward.

Each op by itself has a node of its own, checks of its own and a choice of its own, at every call; with a small batch a
GPU waits for that. What is kept for the backward is what the four ops keep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, ops
from ..block_parts import BlockParts, row_scale
from ..ops import _contract, _register
from . import cpp, hopper
from .plan import Later, Plan, empty_heads, parameters

_CAST = (2, 3, 4, 5, 9, 10, 11, 12)  # of ``parameters``, what autocast casts: weights and biases of the linear layers
_HALF = 7  # of ``parameters``, those of the attention's branch


class Step(NamedTuple):
    """What is the same for all calls of one kind."""

    num_heads: int
    scale: float
    eps1: float
    eps2: float
    act: str
    memory: str
    dtype: torch.dtype | None
    """Autocast's."""
    caches: tuple[bool, bool, bool]
    """Whether packs of qkv's weight, the projection's and the MLP's are kept."""
    backends: tuple[str, str, str, str]


def key(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> tuple:
    """All that the ops' checks and choices depend on."""
    drops = parts.drop_path1 is None, parts.drop_path2 is None
    return "training", drops, _autocast_dtype(x), *cpp.key(parts, x, memory, class_token)


def find_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """From the second call on: the first one is checked by the ops."""
    if class_token or x.dim() != 3 or not _wants(x, *parameters(parts)[:_HALF]):
        return None
    chosen: dict[str, Any] = {}
    dtype = _autocast_dtype(x)
    for name, arguments in _op_calls(parts, x, memory, dtype):
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
    step = Step(num_heads, scale, parts.eps1, parts.eps2, parts.act, memory, dtype, caches, names)  # type: ignore[arg-type]
    return Plan(_BlockTraining.apply, (step,), chosen)


def run(plan: Plan, parts: BlockParts, x: Tensor) -> Tensor | None:
    row_scales = row_scale(parts.drop_path1, x), row_scale(parts.drop_path2, x)
    return plan.run(*plan.arguments, *row_scales, x, *parameters(parts))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    return _contract.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None


def _wants(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _op_calls(parts: BlockParts, x: Tensor, memory: str, dtype: torch.dtype | None) -> list[tuple[str, tuple]]:
    """The ops with arguments such as a block without a plan gives them."""
    num_heads, _, scale = parts.heads
    (qkv,) = empty_heads(parts, x, False)
    qkv = qkv.to(dtype or qkv.dtype).requires_grad_(_wants(x, *parts.norm1, *parts.qkv))
    attended = qkv.new_empty(*x.shape[:2], qkv.shape[-1] // 3).requires_grad_(qkv.requires_grad)
    middle = x.detach().requires_grad_()
    first, second = (None if drop is None else x.new_empty(len(x)) for drop in (parts.drop_path1, parts.drop_path2))
    return [
        ("layernorm_linear", (x, *parts.norm1, *parts.qkv, parts.eps1, True)),
        ("attention_packed", (qkv, num_heads, 0.0, scale, None, None, None)),
        ("linear_residual", (attended, *parts.proj, x, parts.gamma1, first)),
        ("layernorm_mlp", (middle, *parts.mlp, parts.gamma2, second, parts.act, parts.eps2, True, memory)),
    ]


class _BlockTraining(torch.autograd.Function):
    """(step, row_scale1, row_scale2, x, *parameters) -> what the block makes of x."""

    @staticmethod
    def forward(ctx: Any, step: Step, row_scale1: Tensor | None, row_scale2: Tensor | None, x: Tensor, *given: Any):
        weights = given if step.dtype is None else _with_casts(given, _casts(given, step.dtype))
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = _forward(step, row_scale1, row_scale2, x, weights)
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
        x, *saved = ctx.saved_tensors
        saved, row_scales, given, casts = saved[:9], saved[9:11], saved[11:25], saved[25:]
        if torch.is_grad_enabled():
            grads: Any = _differentiable(ctx.step, dout, row_scales, (x, *given), wants)
        else:
            weights = _with_casts(given, casts) if casts else given
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward(ctx.step, dout, x, saved, row_scales, weights, wants)
        return (None,) * 3 + tuple(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))


def _forward(step: Step, row_scale1: Tensor | None, row_scale2: Tensor | None, x: Tensor, weights: Any) -> tuple:
    """What comes out, and nine tensors that the backward reads."""
    in_one = hopper.forward(step, x, weights) if row_scale1 is None and row_scale2 is None else None
    if in_one is not None:
        return tuple(in_one)
    norm_and_qkv, projection, scale1, mlp, scale2 = _split(weights)
    (linear_by, attention_by, residual_by, mlp_by), run = step.backends, _register.IMPLS
    qkv, mean1, rstd1 = run["layernorm_linear_fwd"](x, *norm_and_qkv, step.eps1, step.caches[0], linear_by)
    attended, softmax = run["attention_packed_fwd"](qkv, step.num_heads, step.scale, attention_by)
    branch = (attended, *projection, x, scale1, row_scale1)
    middle = run["linear_residual_fwd"](*branch, step.caches[1], residual_by)
    options = (step.act, step.eps2, True, step.memory == "default", step.caches[2], mlp_by)
    out, mean2, rstd2, h = run["layernorm_mlp_fwd"](middle, *mlp, scale2, row_scale2, *options)
    return out, mean1, rstd1, qkv, attended, softmax, middle, mean2, rstd2, h


def _backward(
    step: Step, dout: Tensor, x: Tensor, saved: Any, row_scales: Any, weights: Any, wants: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of all parameters, by the backwards of the four ops. Autocast's PyTorch casts back."""
    if _is_whole(row_scales, weights, wants):
        grads = hopper.backward(step, dout, x, saved, weights)
        if grads is not None:
            return grads
    mean1, rstd1, qkv, attended, softmax, middle, mean2, rstd2, h = saved
    (norm_weight, norm_bias, *qkv_linear), projection, scale1, mlp, scale2 = _split(weights)
    (linear_by, attention_by, residual_by, mlp_by), run = step.backends, _register.IMPLS
    first, wants_attention, wants_middle = list(wants[:5]), any(wants[:5]), any(wants[:8])

    branch = (*mlp, scale2, row_scales[1], step.act, step.eps2, True, [wants_middle, *wants[8:]], mlp_by)
    dmiddle, *mlp_grads = run["layernorm_mlp_bwd"](dout, middle, mean2, rstd2, h, *branch)
    if not wants_middle:
        return (*(None,) * 8, *mlp_grads)
    branch = (attended, *projection, scale1, row_scales[0], [wants_attention, *wants[5:8]], residual_by)
    dattended, *projection_grads = run["linear_residual_bwd"](dmiddle, *branch)
    if not wants_attention:
        return (*(None,) * 5, *projection_grads, *mlp_grads)
    heads = (attended, softmax, step.num_heads, step.scale, attention_by)
    dqkv = run["attention_packed_bwd"](dattended, qkv, *heads)
    branch = (mean1, rstd1, norm_weight, norm_bias, *qkv_linear, dmiddle, first, step.eps1, linear_by)
    return (*run["layernorm_linear_bwd"](dqkv, x, *branch), *projection_grads, *mlp_grads)


def _is_whole(row_scales: Any, weights: Any, wants: tuple[bool, ...]) -> bool:
    """Whether every gradient is wanted of a block with norms' parameters, without LayerScale or DropPath."""
    if row_scales[0] is not None or row_scales[1] is not None or not all(wants[at] for at in _WHOLE):
        return False
    return all(want == (weight is not None) for want, weight in zip(wants[1:], weights, strict=True)) and not (
        wants[7] or wants[14]
    )


_WHOLE = (0, 1, 2, 8, 9)  # x, and the norms' weights and biases


def _split(weights: Any) -> tuple[Any, ...]:
    """``parameters`` as those of norm1 and qkv, of the projection and its scale, of norm2, fc1 and fc2 and theirs."""
    return weights[:4], weights[4:6], weights[6], weights[7:13], weights[13]


def _casts(given: Any, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if given[at] is None else given[at].to(dtype) for at in _CAST]


def _with_casts(given: Any, casts: Any) -> list[Tensor | None]:
    weights = list(given)
    for at, cast in zip(_CAST, casts, strict=True):
        weights[at] = cast
    return weights


def _differentiable(
    step: Step, dout: Tensor, row_scales: Any, inputs: tuple[Tensor, ...], wants: tuple[bool, ...]
) -> list[Tensor | None]:
    """The same gradients by the four ops, which are differentiable once more."""
    with torch.enable_grad():
        known = [t.view_as(t) if wanted else t for t, wanted in zip(inputs, wants, strict=True)]
        with torch.autocast(dout.device.type, step.dtype, enabled=step.dtype is not None):
            out = _by_ops(step, row_scales, *known)
        asked = [t for t, wanted in zip(known, wants, strict=True) if wanted]
        found = iter(torch.autograd.grad(out, asked, dout, create_graph=True, allow_unused=True))
    return [next(found) if wanted else None for wanted in wants]


def _by_ops(step: Step, row_scales: Any, x: Tensor, *weights: Any) -> Tensor:
    norm_and_qkv, projection, scale1, mlp, scale2 = _split(weights)
    weight, bias = projection
    qkv = ops.layernorm_linear(x, *norm_and_qkv, eps=step.eps1)
    attended = ops.attention_packed(qkv, step.num_heads, scale=step.scale)
    x = ops.linear_residual(attended, weight, bias, x, layer_scale=scale1, row_scale=row_scales[0])
    branch: dict[str, Any] = {"layer_scale": scale2, "row_scale": row_scales[1], "memory": step.memory}
    return ops.layernorm_mlp(x, *mlp, act=step.act, eps=step.eps2, **branch)
