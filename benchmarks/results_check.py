"""Hold every committed result under benchmarks/results to one form:  python benchmarks/results_check.py [FILE ...]"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MACHINE = ("device", "driver", "torch", "triton", "python", "commit", "date")
MODES = {"op": ("fwd", "bwd", "full"), "model": ("infer", "train")}
TIMES = ("p20_ms", "p50_ms", "p80_ms")
NUMBERS = (*TIMES, "tflops", "gbps", "peak_mb", "ceiling_share", "error")
ERRORS = ("rms_error", "rms_error_stock", "max_error", "max_error_stock")
REQUIRED = ("provider", "mode", "dtype", "batch", *NUMBERS, "raw_ms")


def check(result: Any) -> Iterator[str]:
    """Everything that is wrong with one result; nothing when it is right."""
    if not isinstance(result, dict) or not isinstance(result.get("machine"), dict):
        yield 'no {"machine": {...}, "rows": [...]}'
        return
    for key in MACHINE:
        if key not in result["machine"]:
            yield f"machine has no {key!r}"
    for key in ("device", "torch", "commit", "date"):
        if not result["machine"].get(key):
            yield f"machine.{key} is empty"
    if not isinstance(result.get("rows"), list) or not result["rows"]:
        yield "there are no rows"
        return
    kind = result.get("kind", "timings")
    checks = {"timings": check_row, "accuracy": check_accuracy_row, "host": check_host_row}
    if kind not in checks:
        yield f"kind is {kind!r}, expected one of {', '.join(checks)}"
        return
    for index, row in enumerate(result["rows"]):
        for problem in checks[kind](row):
            yield f"row {index}: {problem}"
    if kind == "accuracy" and result.get("passed") is not all(row.get("passed") for row in result["rows"]):
        yield f"passed is {result.get('passed')!r}, its rows say otherwise"
    stock = {_case(row) for row in result["rows"] if row.get("provider") == "eager"}
    for row in result["rows"]:
        if row.get("provider") == "fastvit" and _case(row) not in stock:
            yield f"{' '.join(map(str, _case(row)))} has no eager row beside it"


def check_accuracy_row(row: dict[str, Any]) -> Iterator[str]:
    """A row of benchmarks/accuracy.py."""
    missing = [key for key in ("form", "dtype", "tokens", "dim", "tensor", *ERRORS, "passed") if key not in row]
    if missing:
        yield f"no {', '.join(missing)}"
        return
    for key in ERRORS:
        if not (isinstance(row[key], (int, float)) and math.isfinite(row[key])):
            yield f"{key} is {row[key]!r}, expected a finite number"


def check_host_row(row: dict[str, Any]) -> Iterator[str]:
    """A row of benchmarks/host.py: microseconds by the way a call takes."""
    times = [row[key] for key in ("eager", "cpp", "cuda") if key in row]
    if not (row.get("op") and row.get("mode")):
        yield "no op or no mode"
    if not times or not all(isinstance(time, (int, float)) and 0 < time < math.inf for time in times):
        yield f"times are {times}, expected positive numbers"


def check_row(row: dict[str, Any]) -> Iterator[str]:
    kinds = [kind for kind in MODES if kind in row]
    if len(kinds) != 1:
        yield "expected either 'op' or 'model'"
        return
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        yield f"no {', '.join(missing)}"
        return
    if row["mode"] not in MODES[kinds[0]]:
        yield f"mode is {row['mode']!r}, expected one of {', '.join(MODES[kinds[0]])}"
    for key in NUMBERS:
        if row[key] is not None and not (isinstance(row[key], (int, float)) and math.isfinite(row[key])):
            yield f"{key} is {row[key]!r}, expected a finite number or null"
            return
    if row["error"] is None:
        yield "error is null: a timing without its error says nothing"
    if not 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]:
        yield f"times are not in order: {[row[key] for key in TIMES]}"
    samples = [sample for samples in row["raw_ms"] for sample in samples]
    if not samples or not min(samples) <= row["p50_ms"] <= max(samples):
        yield "p50_ms is not within raw_ms"


def _case(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in ("op", "model", "mode", "shape", "batch", "dtype") if row.get(key) is not None)


def main(arguments: list[str]) -> int:
    files = [Path(name) for name in arguments] or sorted(RESULTS.rglob("*.json"))
    failed = 0
    for path in files:
        try:
            problems = list(check(json.loads(path.read_text())))
        except (OSError, ValueError) as error:
            problems = [str(error)]
        failed += bool(problems)
        print(f"{path.name}: " + ("ok" if not problems else "; ".join(problems)))
    if not files:
        print("results-check: left out, no results are committed yet")
        return 0
    print(f"{len(files) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
