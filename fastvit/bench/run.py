"""``run``: cases and providers in, machine and rows out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..dispatch import Unsupported
from ..parity import machine
from ..testing import VIT_SHAPES
from . import op_case
from .model_case import ModelCase
from .op_case import OpCase
from .providers import PROVIDERS, Missing, Refused
from .timing import Candidate, interleave, peak_mb, percentile, ratio_by_round, resident_mb

MODEL_MODES = ("infer", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(
    ops: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    providers: Sequence[str] = ("fastvit", "eager"),
    dtype: str | torch.dtype = "float32",
    batch: int = 8,
    mode: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    rounds: int = 7,
    shape: str = "base",
    ceilings: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Time ``ops`` (all of them when ``models`` is not given either) and ``models``.

    mode      "fwd" (default) | "bwd" | "full" for ops; "infer" (default) | "train" for models
    shape     a name of ``fastvit.testing.VIT_SHAPES``, for ops
    threads   CPU threads; default what PyTorch is set to
    ceilings  measured {"tflops": ..., "gbps": ...} of the device, for ``ceiling_share``
    returns   {"machine": {...}, "rows": [...], "refused": [...]}: one row for each op or model and provider, with
              every raw sample; what failed its accuracy check has no row, "refused" says why
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = _dtype(dtype)
    op_names = list(op_case.NAMES) if ops is None and not models else list(ops or ())
    model_names = list(models or ())
    _check("op", op_names, op_case.NAMES)
    _check("provider", providers, PROVIDERS)
    _check("shape", [shape], VIT_SHAPES)
    modes = (*(op_case.MODES if op_names else ()), *(MODEL_MODES if model_names else ()))
    _check("mode", [mode] if mode else [], modes)
    if rounds < 1 or batch < 1:
        raise ValueError(f"bench: rounds is {rounds} and batch is {batch}, expected at least 1")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    result: dict[str, Any] = {"machine": machine(str(where)), "rows": [], "refused": []}
    try:
        for name in op_names:
            op_mode = mode if mode in op_case.MODES else "fwd"
            case: OpCase | ModelCase = OpCase(name, VIT_SHAPES[shape], batch, kind, where, op_mode)
            label = {"op": name, "mode": op_mode, "shape": shape, "batch": batch}
            _measure(label, case, providers, rounds, ceilings, result)
        for name in model_names:
            model_mode = mode if mode in MODEL_MODES else "infer"
            case = ModelCase(name, batch, kind, where, model_mode)
            label = {"model": name, "mode": model_mode, "batch": batch}
            _measure(label, case, providers, rounds, ceilings, result)
    finally:
        torch.set_num_threads(threads_before)
    return result


def _measure(
    label: dict[str, Any],
    case: OpCase | ModelCase,
    providers: Sequence[str],
    rounds: int,
    ceilings: dict[str, float] | None,
    result: dict[str, Any],
) -> None:
    """Check and time one case with every provider; append to ``result``."""
    label = label | {"dtype": str(case.dtype).removeprefix("torch.")}
    ready: list[Candidate] = []
    for provider in providers:
        try:
            ready.append(_ready(case, provider))
        except (Refused, Unsupported) as refusal:
            entry = label | {"provider": provider, "reason": str(refusal)}
            result["refused"].append(entry | {"missing": isinstance(refusal, (Missing, Unsupported))})
    times = interleave(ready, rounds, case.device)
    eager = next((t for c, t in zip(ready, times, strict=True) if c.provider == "eager"), None)
    best = _best_peer(ready, times)
    for candidate, raw in zip(ready, times, strict=True):
        samples = [sample for samples in raw for sample in samples]
        seconds = statistics.median(samples) / 1000
        row = label | {"provider": candidate.provider} | candidate.notes
        row |= {f"p{share}_ms": percentile(samples, share / 100) for share in (50, 20, 80)}
        row |= {
            "tflops": case.cost.flops / seconds / 1e12,
            "gbps": case.cost.bytes / seconds / 1e9 if case.cost.bytes else None,
            "peak_mb": peak_mb(candidate, case.device),
            "ceiling_share": _ceiling_share(case, seconds, ceilings),
        }
        if eager is not None:
            ratios = ratio_by_round(eager, raw)
            row |= {"ratio_to_eager": statistics.median(ratios), "ratios_to_eager": ratios}
        if best is not None and PROVIDERS[candidate.provider].ours:
            ratios = ratio_by_round(best[1], raw)
            row |= {"best_peer": best[0], "ratio_to_best_peer": statistics.median(ratios)}
        if "model" in label:
            row["images_per_s"] = label["batch"] / seconds
        result["rows"].append(row | {"raw_ms": raw})


def _ready(case: OpCase | ModelCase, provider: str) -> Candidate:
    """Checked and called once. What stays in memory from then on (weights, packs, a runtime's arena) is noted."""
    before = resident_mb(case.device)
    candidate = case.candidate(provider)
    with candidate.context():
        candidate.call(candidate.prepare())
    after = resident_mb(case.device)
    candidate.notes["held_mb"] = None if before is None or after is None else max(0.0, after - before)
    return candidate


def _best_peer(ready: list[Candidate], times: list[list[list[float]]]) -> tuple[str, list[list[float]]] | None:
    """The fastest provider that is not ours, and its times."""
    peers = [(c.provider, raw) for c, raw in zip(ready, times, strict=True) if not PROVIDERS[c.provider].ours]
    return min(peers, key=lambda peer: statistics.median(s for samples in peer[1] for s in samples), default=None)


def _ceiling_share(case: OpCase | ModelCase, seconds: float, ceilings: dict[str, float] | None) -> float | None:
    if ceilings is None:
        return None
    return case.cost.seconds(ceilings["tflops"] * 1e12, ceilings["gbps"] * 1e9) / seconds


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    _check("dtype", [name], DTYPES)
    return DTYPES[name]


def _check(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"bench: {what} is {name!r}, expected one of {', '.join(known)}")


COLUMNS = ("p50_ms", "p20_ms", "p80_ms", "tflops", "gbps", "peak_mb", "error", "ratio_to_eager")


def table(result: dict[str, Any]) -> str:
    """The rows as aligned text, refusals last."""
    head = ["what", "mode", "dtype", "batch", "provider", "backend", *COLUMNS]
    lines = [head]
    for row in result["rows"]:
        what = [row.get("op") or row["model"], row["mode"], row["dtype"], row["batch"], row["provider"]]
        lines.append([*map(str, what), row.get("backend", ""), *(_number(row.get(column)) for column in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [str.ljust] * 6 + [str.rjust] * len(COLUMNS)
    text = ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)) for line in lines]
    refused = [
        f"not timed: {row.get('op') or row['model']} {row['mode']} by {row['provider']}: {row['reason']}"
        for row in result["refused"]
    ]
    return "\n".join(line.rstrip() for line in [*text, *refused])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2e}" if value and abs(value) < 0.01 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
