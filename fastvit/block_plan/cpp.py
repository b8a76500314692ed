"""Plans for a CPU: csrc/cpu/block.cpp, where the ops themselves settled on C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _extension, dispatch, packs
from ..block_parts import BlockParts
from ..ops import _contract
from .plan import Later, Plan, backends_of, op_calls, parameters


def key(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> tuple:
    """All that the ops' checks and choices depend on, and whether packs of weights are kept."""
    facts: list[Any] = [parts.heads, parts.eps1, parts.eps2, parts.act, memory, class_token]
    facts += (packs.are_kept(), dispatch.choices())
    _contract.add_facts(facts, (x, *parameters(parts)))
    return tuple(facts)


def find_plan(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> Plan | None:
    """From the second call on: the first one is checked by the ops."""
    compiled = _extension.cpp()
    if compiled is None or not x.is_cpu or x.dim() != 3:
        return None
    backends = backends_of(("cpp", "cpp"), class_token)
    for name, arguments in op_calls(parts, x, memory, class_token):
        op = dispatch.OPS[name]
        run = op.settled(_contract.key(op, arguments))
        if run is None:
            raise Later
        if run is not backends[name].run:
            return None
    num_heads, _, scale = parts.heads
    settings = (num_heads, scale, parts.eps1, parts.eps2, parts.act, packs.are_kept(), class_token)
    return Plan(compiled.block_fwd, settings, backends)
