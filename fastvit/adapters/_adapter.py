"""What one host class needs to be accelerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Adapter:
    """How to run one class of a host library."""

    part: str
    """"block", or "model" for a whole ViT."""

    forward: Callable
    """``forward(module, x, *args, **kwargs)``: the meaning of the class's own, on the fused ops."""

    is_fast: bool = False
    """The class runs on the fused ops by itself and is only overridden to apply an option."""
