"""Measure callables fairly: warm, interleaved in rounds, on a cold L2, with every raw sample kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROUND_SECONDS = 0.25  # about how long one candidate is timed in one round
MAX_SAMPLES = 20
L2_BYTES = 256 << 20  # more than any cache to be flushed


@dataclass
class Candidate:
    """Something to time: ``call(prepare())``, with only ``call`` on the clock."""

    provider: str
    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    notes: dict[str, Any] = field(default_factory=dict)  # copied into its row


def interleave(candidates: Sequence[Candidate], rounds: int, device: torch.device) -> list[list[list[float]]]:
    """Milliseconds, by candidate, round and sample. Each round times every candidate, each time in another order."""
    sampler = _cuda_samples if device.type == "cuda" else _cpu_samples
    counts = []
    for candidate in candidates:
        with candidate.context():
            sampler(candidate, 2)
            estimate = statistics.median(sampler(candidate, 3)) / 1000
        counts.append(max(1, min(MAX_SAMPLES, round(ROUND_SECONDS / max(estimate, 1e-9)))))
    times: list[list[list[float]]] = [[] for _ in candidates]
    for turn in range(rounds):
        for offset in range(len(candidates)):
            index = (turn + offset) % len(candidates)
            with candidates[index].context():
                times[index].append(sampler(candidates[index], counts[index]))
    return times


def _cpu_samples(candidate: Candidate, count: int) -> list[float]:
    samples = []
    for _ in range(count):
        state = candidate.prepare()
        start = time.perf_counter()
        candidate.call(state)
        samples.append((time.perf_counter() - start) * 1000)
    return samples


def _cuda_samples(candidate: Candidate, count: int) -> list[float]:
    """Queue all samples, then wait once. The flush before each also hides the host's launch time, as in a real step."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        state = candidate.prepare()
        flush.zero_()
        begin.record()
        candidate.call(state)
        end.record()
        del state
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def peak_mb(candidate: Candidate, device: torch.device) -> float | None:
    """Memory that one call needs on top of what is there before it; None where it cannot be known."""
    with candidate.context():
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            candidate.call(candidate.prepare())
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc still holds would hide what a call needs
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
            before = _status_kb("VmRSS")
            candidate.call(candidate.prepare())
            return max(0.0, (_status_kb("VmHWM") - before) * 1024 / 1e6)
        except (OSError, AttributeError):  # not Linux, or not glibc
            return None


def resident_mb(device: torch.device) -> float | None:
    """Memory in use now: allocated on a GPU, resident on a CPU; None where it cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 1e6
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return _status_kb("VmRSS") * 1024 / 1e6
    except (OSError, AttributeError):
        return None


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy does it."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio_by_round(baseline: list[list[float]], ours: list[list[float]]) -> list[float]:
    """How many times faster ``ours`` is, within each round: what drifts between rounds cancels."""
    return [statistics.median(b) / statistics.median(o) for b, o in zip(baseline, ours, strict=True)]
