"""What one host class needs to be accelerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ._override import is_patched


@dataclass(frozen=True)
class Adapter:
    """How to run one class of a host library."""

    part: str
    """"block", or "model" for a whole ViT."""

    forward: Callable
    """``forward(module, x, *args, **kwargs)``: the meaning of the class's own, on the fused ops."""

    needs: tuple[str, ...]
    """Attributes that ``forward`` reads and that older versions of the host do not have."""

    is_fast: bool = False
    """The class runs on the fused ops by itself and is only overridden to apply an option."""

    def why_not(self, module: nn.Module) -> list[str]:
        """Reasons to leave ``module`` alone for good, known before it is called."""
        if is_patched(module):
            return ["forward was replaced on this instance"]
        missing = [path for path in self.needs if not _has(module, path)]
        return [f"there is no {', '.join(missing)}: a version of the host that is not supported"] if missing else []


def _has(module: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True
