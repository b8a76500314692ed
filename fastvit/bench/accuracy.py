"""The gate in front of every timing: as accurate as stock PyTorch, measured against float64 on what is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..testing import accuracy
from .providers import Refused

CHECKED_ELEMENTS = 1 << 22


def sample(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every result, or of a large one an even sample of about ``CHECKED_ELEMENTS`` that meets every column."""
    sampled = {}
    for name, value in results.items():
        if not torch.isfinite(value).all():
            raise Refused(f"{name} has values that are not finite")
        step = value.numel() // CHECKED_ELEMENTS | 1
        sampled[name] = value.detach().flatten()[::step].clone() if step > 1 else value.detach()
    return sampled


def check(results: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The worst relative error of ``results``; raises ``Refused`` when one misses the gates of fastvit.testing."""
    worst = 0.0
    for name, value in results.items():
        found = accuracy(value, eager[name], exact[name])
        if not found.passed:
            raise Refused(
                f"{name}: max error {found.max_error:.3e} (limit {found.max_limit:.3e}), "
                f"rms error {found.rms_error:.3e} (limit {found.rms_limit:.3e})"
            )
        worst = max(worst, found.rms_error / max(rms(exact[name]), torch.finfo(torch.float64).tiny))
    return worst


def rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()
