"""Packed copies of weights: on a CPU the C++ ops make one of each weight and keep it between calls.

A pack takes as much memory as its weight (16-bit weights on a machine without 16-bit products: twice as much) and goes
with it. It is made again when the weight was changed. Storage, address and version counter are compared at each call.
A write through ``.data`` counts no version: whatever changes most values, or a column, is seen by the next call, a few
changed values within 64 calls at the latest. ``clear_pack_cache`` after such a write leaves nothing to chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from . import _extension

_refusals = 0


def clear_pack_cache() -> None:
    """Forget every packed weight: the next call packs anew. Frees their memory."""
    cpp = _extension.cpp()
    if cpp is not None:
        cpp.clear_pack_cache()


def pack_bytes(weights: Sequence[Tensor] | None = None) -> int:
    """Memory that the packs of these weights take now; by default all packs."""
    cpp = _extension.cpp()
    if cpp is None:
        return 0
    return sum(cpp.pack_cache_info(weight)["bytes"] for weight in ([None] if weights is None else weights))


@contextmanager
def unkept_packs() -> Iterator[None]:
    """Inside, in every thread of the process, a weight is packed for one call only."""
    global _refusals
    _refusals += 1
    try:
        yield
    finally:
        _refusals -= 1


def are_kept() -> bool:
    return _refusals == 0
