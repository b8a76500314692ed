"""Speed and memory of stock and fastvit models side by side, as the demo shows them."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..bench import timing


def compare(models: dict[str, nn.Module], images: Tensor, mode: str, rounds: int) -> list[dict[str, Any]]:
    """A row for every provider; "speedup" is against the first one, the median of ratios taken within a round.

    mode  "infer" (no gradients) or "train" (forward and backward)
    """
    device = images.device
    candidates = [timing.Candidate(provider, _step(model, images, mode)) for provider, model in models.items()]
    times = timing.interleave(candidates, rounds, device)
    rows = []
    for candidate, rounds_of_samples in zip(candidates, times, strict=True):
        samples = [sample for samples in rounds_of_samples for sample in samples]
        middle = statistics.median(samples)
        rows.append(
            {
                "provider": candidate.provider,
                "mode": mode,
                "batch": len(images),
                "image_size": images.shape[-1],
                "dtype": str(images.dtype).removeprefix("torch."),
                "p50_ms": middle,
                "p20_ms": timing.percentile(samples, 0.2),
                "p80_ms": timing.percentile(samples, 0.8),
                "images_per_s": 1000 * len(images) / middle,
                "speedup": statistics.median(timing.ratio_by_round(times[0], rounds_of_samples)),
                "peak_mb": _peak_mb(candidate, device),
                "rounds_ms": rounds_of_samples,
            }
        )
    return rows


def _step(model: nn.Module, images: Tensor, mode: str) -> Callable[[Any], None]:
    def infer(_: Any) -> None:
        with torch.inference_mode():
            model(images)

    def train(_: Any) -> None:
        model(images).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return {"infer": infer, "train": train}[mode]


def _peak_mb(candidate: timing.Candidate, device: torch.device) -> float | None:
    with contextlib.suppress(OSError, AttributeError):  # glibc: pages freed but still mapped would hide the growth
        ctypes.CDLL(None).malloc_trim(0)
    return timing.peak_mb(candidate, device)
