"""Plans for Hopper: csrc/cuda/sm90/block.cpp launches a block's kernels, attention as Triton compiled it or its own.

In training it also returns what the backward reads, which block_bwd.cpp does.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

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
# BlockBwdPlan of block_bwd.cpp: batch, tokens, heads; scale; act, act_grad_is_small, by_triton; what is wanted
_BWD_LAYOUT = Struct("=3qf3iI4x")
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


class _Packed(NamedTuple):
    plan: Tensor
    """A BlockPlan, or a BlockBwdPlan."""
    launches: tuple[Any, ...]
    """Kept, so that their binaries stay loaded."""

    def is_watched(self) -> bool:
        return any(launch.is_watched() for launch in self.launches)


_MOST_KEPT = 1024
_UNKNOWN: Any = object()
_packed: dict[tuple, _Packed | None] = {}


def _keep(key: tuple, found: _Packed | None) -> _Packed | None:
    if len(_packed) >= _MOST_KEPT:
        _packed.clear()
    _packed[key] = found
    return found


def forward(step: Any, row_scales: tuple, x: Tensor, weights: Any) -> Sequence[Tensor] | None:
    """What kernels.py's ``forward`` returns, in one call; None where it takes the ops' forwards."""
    qkv_weight, fc1_weight = weights[2], weights[9]
    key = (step, x.shape, x.dtype, x.device, qkv_weight.shape, qkv_weight.dtype, fc1_weight.shape)
    found = _packed.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        found = _find_forward(key, step, x, weights)
    if found is None or found.is_watched():
        return None
    return _cuda.ops.block_saving(x, *weights, *row_scales, found.plan) or None


def _find_forward(key: tuple, step: Any, x: Tensor, weights: Any) -> _Packed | None:
    parts = BlockParts(
        norm1=weights[:2], eps1=step.eps1, qkv=weights[2:4], heads=(step.num_heads, 0.0, step.scale), head_norms={},
        proj=weights[4:6], gamma1=weights[6], drop_path1=None, mlp=weights[7:13], eps2=step.eps2, act=step.act,
        gamma2=weights[13], drop_path2=None,
    )  # fmt: skip
    fits = step.memory == "default" and _runs_what_is_here(step, weights[2]) and _may_have_plan(parts, x)
    if fits and step.backends[1] == "cuda":
        return _keep(key, _Packed(_pack(parts, x, False, None), ()))
    try:
        launch = _made_launch(parts, x, False) if fits else None
    except Later:
        return None
    return _keep(key, None if launch is None else _Packed(_pack(parts, x, False, launch), (launch,)))


def _runs_what_is_here(step: Any, weight: Tensor) -> bool:
    """Whether the ops would run the kernels that block.cpp and block_bwd.cpp launch."""
    linear_by, attention_by, residual_by, mlp_by = step.backends
    if (linear_by, residual_by, mlp_by) != ("cuda",) * 3 or attention_by not in ("cuda", "triton"):
        return False
    is_there = hasattr(_cuda.ops, "block_bwd") and weight.dtype in _sm90.NAMES
    return is_there and not _sm90.why_not_built(_cuda.ops, weight.device.index or 0)


def backward(
    step: Any, dout: Tensor, x: Tensor, saved: Any, row_scales: Any, weights: Any, wants: tuple[bool, ...]
) -> Sequence[Tensor] | None:
    """What kernels.py's ``backward`` returns, in one call; None where it takes the ops' backwards."""
    _, _, qkv, attended, softmax, *_ = saved
    key = (step, wants, qkv.shape, qkv.dtype, qkv.device, _tiles.ACT_GRAD)
    found = _packed.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        found = _find_backward(key, step, wants, qkv, attended, softmax)
    if found is None or found.is_watched():
        return None
    return _cuda.ops.block_bwd(dout, x, *saved, *weights, *row_scales, found.plan) or None


_OF_ATTENTION = 5  # of the gradients, those that come through the attention


def _find_backward(
    key: tuple, step: Any, wants: tuple[bool, ...], qkv: Tensor, attended: Tensor, softmax: Tensor
) -> _Packed | None:
    if step.memory != "default" or not _runs_what_is_here(step, qkv):
        return _keep(key, None)
    by_triton = any(wants[:_OF_ATTENTION]) and not (step.backends[1] == "cuda" and _has_own_backward(step, qkv))
    launches = _made_backward(step, qkv, attended, softmax) if by_triton else ()
    if by_triton and not launches:
        return None  # not yet: the first backward, by the ops, compiles and launches them
    if not all(launch.is_packable() for launch in launches):
        return _keep(key, None)
    wanted = sum(want << at for at, want in enumerate(wants))
    kinds = (_ACTIVATIONS.index(step.act), _TILES.index(_tiles.ACT_GRAD), by_triton, wanted)
    packed = _BWD_LAYOUT.pack(qkv.shape[0], qkv.shape[1], step.num_heads, step.scale, *kinds)
    packed += b"".join(launch.packed() for launch in launches) or bytes(2 * _COMPILED)
    return _keep(key, _Packed(torch.frombuffer(bytearray(packed), dtype=torch.uint8), launches))


def _has_own_backward(step: Any, qkv: Tensor) -> bool:
    head_dim, keys = qkv.shape[2] // (3 * step.num_heads), qkv.shape[1]
    return head_dim == _sm90.BWD_HEAD_DIM and keys in _sm90.BWD_KEYS and hasattr(_cuda.ops, "attention_bwd")


def _made_backward(step: Any, qkv: Tensor, attended: Tensor, softmax: Tensor) -> tuple[Any, ...]:
    from ..kernels import _launch, attention, attention_few  # type: ignore[attr-defined]

    if not _launch.REPLAYED or qkv.shape[1] <= attention_few.MOST_QUERIES:
        return ()
    return attention.made_packed_bwd(attended, qkv, attended, softmax, step.num_heads, step.scale)
