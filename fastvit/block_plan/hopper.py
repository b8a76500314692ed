"""Plans for Hopper: csrc/cuda/sm90/block.cpp launches a block's kernels, the attention's as Triton compiled it."""

from __future__ import annotations

from struct import Struct
from typing import Any

import torch
from torch import Tensor

from .. import _extension, dispatch
from ..block_parts import BlockParts
from ..ops import _cuda, _sm90, _tiles
from .plan import Later, Plan, backends_of, empty_heads, op_calls

# BlockPlan of block.cpp: batch, tokens, width, attended, hidden, statistics; eps1, eps2; act, class_token, five tiles
_LAYOUT = Struct("=6q2f7i4x")
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
_TILES = ("large", "small")


def key(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> tuple:
    """All that a plan depends on. What else there is of the tensors, block.cpp looks at in each call."""
    qkv, fc1 = parts.qkv[0], parts.mlp[2]
    sizes = (x.shape, x.dtype, x.device, qkv.shape, qkv.dtype, fc1.shape)
    return sizes, parts.heads, parts.eps1, parts.eps2, parts.act, class_token, dispatch.choices()


def find_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """From the second call on: the first one, by the ops, compiles the attention and launches it."""
    if not _may_have_plan(parts, x):
        return None
    backends = backends_of(("triton", "cuda"), class_token)
    launch = _made_launch(empty_heads(parts, x, class_token), parts)
    if launch is None:
        raise Later
    if not (launch.is_packable() and _are_chosen(backends, op_calls(parts, x, memory, class_token))):
        return None
    packed = _pack(parts, x, class_token, launch)
    return Plan(_cuda.ops.block.default, (packed,), backends, launch)


def _may_have_plan(parts: BlockParts, x: Tensor) -> bool:
    """Whether block.cpp is there, its kernels take such tensors, and the attention's launch will be known."""
    settings = (*parts.heads, parts.eps1, parts.eps2)
    if not all(type(value) in (int, float) for value in settings):  # known by what they are, not by what they hold
        return False
    if x.dim() != 3 or parts.qkv[0].dtype not in _sm90.NAMES or _extension.why_not_triton():
        return False
    from ..kernels import _launch, attention_few  # type: ignore[attr-defined]

    if not _launch.REPLAYED or x.shape[1] <= attention_few.MOST_QUERIES:
        return False
    return hasattr(_cuda.ops, "block") and not _sm90.why_not_built(_cuda.ops, x.device.index or 0)


def _made_launch(heads: tuple[Tensor, ...], parts: BlockParts) -> Any:
    from ..kernels import attention, attention_few  # type: ignore[attr-defined]

    num_heads, _, scale = parts.heads
    if len(heads) == 1:
        return attention.made_packed_fwd(*heads, num_heads, scale)
    return attention_few.made_few_fwd(*heads, scale)


def _are_chosen(backends: dict[str, Any], calls: list[tuple[str, tuple]]) -> bool:
    """Whether these are what the ops choose for such calls."""
    try:
        return all(dispatch.OPS[op].select(*arguments) is backends[op] for op, arguments in calls)
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
