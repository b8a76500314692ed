"""How host libraries spell a ViT: for each of their classes, what may stand in for its ``forward``."""

from __future__ import annotations

from torch import nn

from . import native, timm
from ._adapter import Adapter

__all__ = ["Adapter", "find_adapter"]

# A class is known by its forward, without importing its library; a subclass with its own forward is not known.
_ADAPTERS: dict[tuple[str, str], Adapter] = timm.ADAPTERS | native.ADAPTERS


def find_adapter(module: nn.Module) -> Adapter | None:
    """The adapter for ``module``; None when its class is not known."""
    forward = getattr(type(module), "forward", None)
    return _ADAPTERS.get((getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")))
