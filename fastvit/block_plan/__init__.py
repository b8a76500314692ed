"""A block in one call, or in training in one autograd node, where its ops would run the same kernels.

At batch 1 a GPU waits for the host, and a CPU's threads do; most of what the host does for a block comes to the same
result every time: what is allowed, which backends, tiles and binaries. That is a plan (``plan``), made by ``hopper``,
``cpp`` or ``training`` and kept by all that it depends on. The rest is looked at anew at each call: the block's modules
(``block_parts``), modes, recorders and gradients here, the tensors by the key or by what the plan calls. In everything
unusual the ops run. The kernels are the same, so the result is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..block_parts import BlockParts
from ..ops import _register
from . import cpp, hopper, training
from .plan import Later, Plan, class_token_heads, class_token_linears, parameters

__all__ = ["class_token_heads", "class_token_linears", "looks_ahead", "run_block", "run_blocks"]

_MOST_KEPT = 1024
_plans: dict[tuple, Plan | None] = {}
_UNKNOWN: Any = object()


def run_block(parts: BlockParts, x: Tensor, memory: str = "default", *, class_token: bool = False) -> Tensor | None:
    """What the block makes of x (B, N, E), or of its token 0 alone; None where the ops have to run."""
    if not _is_unwatched():
        return None
    if _needs_gradient(parts, x):
        plan = _training_plan(parts, x, memory, class_token)
        return None if plan is None else training.run(plan, parts, x)
    plan = _usable_plan(parts, x, memory, class_token)
    return None if plan is None else _run(plan, parts, x)


def looks_ahead(x: Tensor) -> bool:
    """Whether all blocks are to be looked at before the first one runs.

    Between two blocks a CPU's threads wait for the host, and its code has to come back into the caches each time. A GPU
    is at work meanwhile.
    """
    return not _is_on_gpu(x)


def run_blocks(blocks: Sequence[BlockParts], x: Tensor) -> tuple[Tensor, int]:
    """What the first of these make of x, and how many they are: 0 where the ops have to run."""
    plans: list[Plan] = []
    for parts in blocks if _is_unwatched() else ():
        if _needs_gradient(parts, x):
            break
        plan = _usable_plan(parts, x, "default", False)  # what comes out of a block is what goes into the next
        if plan is None:
            break
        plans.append(plan)
    for done, (plan, parts) in enumerate(zip(plans, blocks, strict=False)):
        out = _run(plan, parts, x)
        if out is None:
            return x, done
        x = out
    return x, len(plans)


def _usable_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """For inference."""
    if not _is_plain(parts) or _drops_paths(parts) or torch._C._is_any_autocast_enabled():
        return None
    return _plan_by(hopper if _is_on_gpu(x) else cpp, parts, x, memory, class_token)


def _training_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """Not where hooks take what is saved: checkpointing counts it, and the first call of a kind is the ops'."""
    if not _is_plain(parts) or _top_saved_tensors_hooks(True) is not None:
        return None
    return _plan_by(training, parts, x, memory, class_token)


_top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _plan_by(way: ModuleType, parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    key = way.key(parts, x, memory, class_token)
    plan = _plans.get(key, _UNKNOWN)  # one question: another thread may clear them
    if plan is _UNKNOWN:
        plan = _find_plan(way, key, parts, x, memory, class_token)
    return None if plan is None or plan.is_outdated() else plan


def _find_plan(way: ModuleType, key: tuple, *call: Any) -> Plan | None:
    try:
        plan = way.find_plan(*call)
    except Later:
        return None
    if len(_plans) >= _MOST_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan


def _run(plan: Plan, parts: BlockParts, x: Tensor) -> Tensor | None:
    """None where a tensor is not as the kernels want it."""
    with torch._C._AutoDispatchBelowAutograd():
        return plan.run(x, *parameters(parts), *plan.arguments)


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _is_plain(parts: BlockParts) -> bool:
    """Whether the attention drops nothing, and q and k are not normalised."""
    return not parts.heads[1] and not parts.head_norms


def _drops_paths(parts: BlockParts) -> bool:
    return parts.drop_path1 is not None or parts.drop_path2 is not None


def _is_unwatched() -> bool:
    """Whether no mode, transform or recorder may want to see the ops."""
    return not (dispatch.is_observed() or _register.is_watched_by_any_mode())


def _needs_gradient(parts: BlockParts, x: Tensor) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(x, *parameters(parts))
