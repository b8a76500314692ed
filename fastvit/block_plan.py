"""A block's inference in one call, where the four ops would run Hopper's kernels and the packed attention.

At batch 1 a GPU waits for the host, and most of what the host does for a block comes to the same result every time:
which backends, which tiles, which binary with which arguments. That is a plan, kept by all that it depends on. The rest
is looked at anew at each call: the block's modules (``block_parts``), modes, recorders and gradients here, and every
tensor by csrc/cuda/sm90/block.cpp, which leaves the call where one is not as the kernels want it. Then, as in
everything unusual, the four ops run. The kernels are the same, so the result is too.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension, dispatch
from .block_parts import BlockParts
from .ops import _cuda, _register, _sm90, _tiles

# BlockPlan of block.cpp: batch, tokens, width, attended, hidden, statistics; eps1, eps2; act, class_token, five tiles
_LAYOUT = Struct("=6q2f7i4x")
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
_TILES = ("large", "small")
_MOST_KEPT = 1024


class Plan(NamedTuple):
    run: Callable[..., Tensor | None]
    packed: Tensor
    """What ``run`` reads of it: a BlockPlan, byte by byte."""
    backends: tuple[Any, ...]
    """That it stands in for."""
    class_token: bool
    launch: Any
    """The attention's, made before; kept, so that its binary stays loaded."""


_plans: dict[tuple, Plan | None] = {}


def run_block(parts: BlockParts, x: Tensor, class_token: bool = False) -> Tensor | None:
    """What the block makes of x (B, N, E), or of its token 0 alone; None where the ops have to run."""
    if not (_is_on_gpu(x) and _is_plain(parts) and _is_unwatched() and _needs_no_gradient(parts, x)):
        return None
    key = _key(parts, x, class_token)
    plan = _plans[key] if key in _plans else _find_plan(key, parts, x, class_token)
    return None if plan is None or _is_outdated(plan) else _run(plan, parts, x)


def _run(plan: Plan, parts: BlockParts, x: Tensor) -> Tensor | None:
    """None where a tensor is not as the kernels want it."""
    with torch._C._AutoDispatchBelowAutograd():
        return plan.run(x, *_parameters(parts), plan.packed)


def _parameters(parts: BlockParts) -> tuple[Tensor | None, ...]:
    return *parts.norm1, *parts.qkv, *parts.proj, parts.gamma1, *parts.mlp, parts.gamma2


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _is_plain(parts: BlockParts) -> bool:
    """Whether nothing is dropped, and q and k are not normalised."""
    drops = parts.heads[1] or parts.drop_path1 is not None or parts.drop_path2 is not None
    return not drops and not parts.head_norms


def _is_unwatched() -> bool:
    """Whether no mode, transform or recorder may want to see the four ops, and autocast wants no casts."""
    return not (torch._C._is_any_autocast_enabled() or dispatch.is_observed() or _register.is_watched_by_any_mode())


def _needs_no_gradient(parts: BlockParts, x: Tensor) -> bool:
    return not torch.is_grad_enabled() or not torch._C._any_requires_grad(x, *_parameters(parts))


def _is_outdated(plan: Plan) -> bool:
    return plan.backends != _backends(plan.class_token) or plan.launch.is_watched()


def _backends(class_token: bool) -> tuple[Any, ...]:
    """Those whose kernels block.cpp launches."""
    ops = dispatch.OPS
    return (
        ops["layernorm_linear"].backends.get("cuda"),
        ops["attention" if class_token else "attention_packed"].backends.get("triton"),
        ops["linear_residual"].backends.get("cuda"),
        ops["layernorm_mlp"].backends.get("cuda"),
    )


def _key(parts: BlockParts, x: Tensor, class_token: bool) -> tuple:
    """All that a plan depends on."""
    qkv, fc1 = parts.qkv[0], parts.mlp[2]
    sizes = (x.shape, x.dtype, x.device, qkv.shape, qkv.dtype, fc1.shape)
    return sizes, parts.heads, parts.eps1, parts.eps2, parts.act, class_token, dispatch.choices()


def _find_plan(key: tuple, parts: BlockParts, x: Tensor, class_token: bool) -> Plan | None:
    """From the second call on: the first one, by the ops, compiles the attention and launches it."""
    plan = None
    if _may_have_plan(parts, x):
        heads, backends = _empty_heads(parts, x, class_token), _backends(class_token)
        launch = _made_launch(heads, parts)
        if launch is None:
            return None
        if launch.is_packable() and _are_chosen(backends, heads, parts, x):
            packed = _pack(parts, x, class_token, launch)
            plan = Plan(_cuda.ops.block.default, packed, backends, class_token, launch)
    if len(_plans) >= _MOST_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan


def _may_have_plan(parts: BlockParts, x: Tensor) -> bool:
    """Whether block.cpp is there, its kernels take such tensors, and the attention's launch will be known."""
    settings = (*parts.heads, parts.eps1, parts.eps2)
    if not all(type(value) in (int, float) for value in settings):  # known by what they are, not by what they hold
        return False
    if x.dim() != 3 or parts.qkv[0].dtype not in _sm90.NAMES or _extension.why_not_triton():
        return False
    from .kernels import _launch, attention_few  # type: ignore[attr-defined]

    if not _launch.REPLAYED or x.shape[1] <= attention_few.MOST_QUERIES:
        return False
    return hasattr(_cuda.ops, "block") and not _sm90.why_not_built(_cuda.ops, x.device.index or 0)


def class_token_heads(q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, 1, H * D) and kv (B, N, 2 * H * D) as q (B, H, 1, D), k and v (B, H, N, D)."""
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q.unflatten(-1, (num_heads, -1)).transpose(1, 2), k, v


def _empty_heads(parts: BlockParts, x: Tensor, class_token: bool) -> tuple[Tensor, ...]:
    """Laid out as what the attention is given: a packed projection, or the class token's q, and k and v of all."""
    weight, (batch, tokens, _) = parts.qkv[0], x.shape
    width = weight.shape[0] // 3
    if not class_token:
        return (weight.new_empty(batch, tokens, 3 * width),)
    return class_token_heads(
        weight.new_empty(batch, 1, width), weight.new_empty(batch, tokens, 2 * width), parts.heads[0]
    )


def _made_launch(heads: tuple[Tensor, ...], parts: BlockParts) -> Any:
    from .kernels import attention, attention_few  # type: ignore[attr-defined]

    num_heads, _, scale = parts.heads
    if len(heads) == 1:
        return attention.made_packed_fwd(*heads, num_heads, scale)
    return attention_few.made_few_fwd(*heads, scale)


def _are_chosen(backends: tuple[Any, ...], heads: tuple[Tensor, ...], parts: BlockParts, x: Tensor) -> bool:
    """Whether these are what the ops choose for such a call."""
    ops, (num_heads, _, scale) = dispatch.OPS, parts.heads
    residual = x if len(heads) == 1 else x[:, :1]
    attended = heads[0].new_empty(*residual.shape[:2], parts.qkv[0].shape[0] // 3)
    options = (num_heads, 0.0, scale) if len(heads) == 1 else (None, False, 0.0, scale)
    calls: dict[str, tuple] = {
        "layernorm_linear": (x, *parts.norm1, *parts.qkv, parts.eps1, True),
        "attention_packed" if len(heads) == 1 else "attention": (*heads, *options, None, None, None),
        "linear_residual": (attended, *parts.proj, residual, parts.gamma1, None),
        "layernorm_mlp": (residual, *parts.mlp, parts.gamma2, None, parts.act, parts.eps2, True, "default"),
    }
    try:
        return tuple(ops[name].select(*arguments) for name, arguments in calls.items()) == backends
    except dispatch.Unsupported:
        return False  # which the op says itself


def _pack(parts: BlockParts, x: Tensor, class_token: bool, launch: Any) -> Tensor:
    """A BlockPlan."""
    batch, tokens, width = x.shape
    attended, hidden, num_heads = parts.qkv[0].shape[0] // 3, parts.mlp[2].shape[0], parts.heads[0]
    rows, queries = batch * tokens, batch if class_token else batch * tokens
    sizes = (batch, tokens, width, attended, hidden, queries * num_heads)  # one statistic a query of a head
    products = (
        ("linear_act", queries, attended, width),
        ("linear_act", rows, (2 if class_token else 3) * attended, width),
        ("linear_residual", queries, width, attended),
        ("linear_act", queries, hidden, width),
        ("linear_residual", queries, width, hidden),
    )
    dtype, multiprocessors = _sm90.NAMES[parts.qkv[0].dtype], _sm90.device_facts(x.device.index or 0)[1]
    tiles = [_tiles.choose(op, dtype, *size, multiprocessors) for op, *size in products]
    kinds = (_ACTIVATIONS.index(parts.act), class_token, *map(_TILES.index, tiles))
    packed = _LAYOUT.pack(*sizes, parts.eps1, parts.eps2, *kinds) + launch.packed()
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)
