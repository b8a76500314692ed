"""Write README's tables from the newest result file of each device:  python benchmarks/results.py [--print]"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvit.bench.timing import ratio_by_round

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin (make results) -->", "<!-- results:end -->"
HEAD = (
    "",
    "mode",
    "dtype",
    "batch",
    "eager ms",
    "compile ms",
    "fastvit ms",
    "vs eager",
    "vs compile",
    "memory",
    "error",
)


def newest() -> Iterator[dict[str, Any]]:
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        if found:
            yield max(found, key=lambda result: result["machine"]["date"])


def section(result: dict[str, Any]) -> list[str]:
    """One device: a line that says what it was measured on, and a table."""
    machine = result["machine"]
    versions = [f"torch {machine['torch']}", f"triton {machine['triton']}", f"Python {machine['python']}"]
    if machine.get("driver"):
        versions.append(f"driver {machine['driver']}")
    lines = [f"**{machine['device']}**, {', '.join(versions)}; commit {machine['commit']}, {machine['date'][:10]}.", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * 4 + "---:|" * (len(HEAD) - 4)]
    return lines + ["| " + " | ".join(line(case)) + " |" for case in cases(result["rows"])] + [""]


def cases(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Rows timed together, by provider; of a case timed more than once, the run with most providers."""
    together: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row.get("op"), row.get("model"), row["mode"], row["dtype"], row["batch"], row.get("job"))
        together.setdefault(key, {})[row["provider"]] = row
    best: dict[tuple, dict[str, dict[str, Any]]] = {}
    for key, case in together.items():
        if "fastvit" in case and len(case) > len(best.get(key[:-1], ())):
            best[key[:-1]] = case
    return list(best.values())


def line(case: dict[str, dict[str, Any]]) -> list[str]:
    ours, eager, compiled = case["fastvit"], case.get("eager"), case.get("compile")
    return [
        ours.get("op") or ours["model"],
        ours["mode"],
        ours["dtype"],
        str(ours["batch"]),
        *(f"{row['p50_ms']:.3g}" if row else "-" for row in (eager, compiled, ours)),
        *(f"{faster(row, ours):.2f}x" if row else "-" for row in (eager, compiled)),
        share(ours, eager, "peak_mb"),
        share(ours, eager, "error"),
    ]


def faster(other: dict[str, Any], ours: dict[str, Any]) -> float:
    return statistics.median(ratio_by_round(other["raw_ms"], ours["raw_ms"]))


def share(ours: dict[str, Any], eager: dict[str, Any] | None, key: str) -> str:
    """Ours over eager's."""
    return f"{ours[key] / eager[key]:.2f}x" if eager and ours[key] and eager[key] else "-"


def main() -> int:
    text = [line for result in newest() for line in section(result)]
    if text:
        text.append(
            "Times are medians; ratios are medians of ratios taken within interleaved rounds; memory and error are"
        )
        text.append("fastvit's over eager's, the error against float64. Every raw sample is in `benchmarks/results`.")
    if "--print" in sys.argv:
        print("\n".join(text))
        return 0
    before, _, rest = README.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"results: README.md has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    README.write_text(before + "\n".join([BEGIN, *text, END]) + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
