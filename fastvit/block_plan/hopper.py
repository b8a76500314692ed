"""Plans for Hopper: csrc/cuda/sm90/block.cpp launches a block's kernels, attention as Triton compiled it or its own."""

from __future__ import annotations

from struct import Struct
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..block_parts import BlockParts
from ..ops import _cuda, _sm90, _tiles
from .plan import Later, Plan, backends_of, empty_heads, op_calls

# BlockPlan of block.cpp: batch, tokens, width, attended, hidden, heads; eps1, eps2, scale; act, class_token, by_triton,
# five tiles; what Triton compiled
_LAYOUT = Struct("=6q3f8i4x")
_COMPILED = 224  # bytes of a CompiledKernel
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
_TILES = ("large", "small")


def key(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> tuple:
    """All that a plan depends on. What else there is of the tensors, block.cpp looks at in each call."""
    qkv, fc1 = parts.qkv[0], parts.mlp[2]
    sizes = (x.shape, x.dtype, x.device, qkv.shape, qkv.dtype, fc1.shape)
    return sizes, parts.heads, parts.eps1, parts.eps2, parts.act, class_token, dispatch.choices()


def find_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """For Triton's attention from the second call on: the first one, by the ops, compiles and launches it."""
    if not _may_have_plan(parts, x):
        return None
    calls = op_calls(parts, x, memory, class_token)
    own, triton = (backends_of((name, "cuda"), class_token) for name in ("cuda", "triton"))
    if _are_chosen(own, calls):
        return Plan(_cuda.ops.block.default, (_pack(parts, x, class_token, None),), own)
    launch = _made_launch(parts, x, class_token) if _are_chosen(triton, calls) else None
    if launch is None:
        return None
    return Plan(_cuda.ops.block.default, (_pack(parts, x, class_token, launch),), triton, launch)


def _may_have_plan(parts: BlockParts, x: Tensor) -> bool:
    """Whether block.cpp is there, and its kernels take such tensors."""
    settings = (*parts.heads, parts.eps1, parts.eps2)
    if not all(type(value) in (int, float) for value in settings):  # known by what they are, not by what they hold
        return False
    if x.dim() != 3 or parts.qkv[0].dtype not in _sm90.NAMES:
        return False
    return hasattr(_cuda.ops, "block") and not _sm90.why_not_built(_cuda.ops, x.device.index or 0)


def _made_launch(parts: BlockParts, x: Tensor, class_token: bool) -> Any:
    """Of Triton's attention; None where launches are not replayed, or are more than block.cpp can do."""
    from ..kernels import _launch, attention, attention_few  # type: ignore[attr-defined]

    if not _launch.REPLAYED or x.shape[1] <= attention_few.MOST_QUERIES:
        return None
    heads, (num_heads, _, scale) = empty_heads(parts, x, class_token), parts.heads
    if class_token:
        launch = attention_few.made_few_fwd(*heads, scale)
    else:
        launch = attention.made_packed_fwd(*heads, num_heads, scale)
    if launch is None:
        raise Later
    return launch if launch.is_packable() else None


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
    sizes = (batch, tokens, width, attended, hidden, num_heads)
    products = (
        ("linear_act", queries, attended, width),
        ("linear_act", rows, (2 if class_token else 3) * attended, width),
        ("linear_residual", queries, width, attended),
        ("linear_act", queries, hidden, width),
        ("linear_residual", queries, width, hidden),
    )
    dtype, multiprocessors = _sm90.NAMES[parts.qkv[0].dtype], _sm90.device_facts(x.device.index or 0)[1]
    tiles = [_tiles.choose(op, dtype, *size, multiprocessors) for op, *size in products]
    kinds = (_ACTIVATIONS.index(parts.act), class_token, launch is not None, *map(_TILES.index, tiles))
    packed = _LAYOUT.pack(*sizes, parts.eps1, parts.eps2, parts.heads[2], *kinds)
    packed += bytes(_COMPILED) if launch is None else launch.packed()
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)
