"""Write README's tables from the result files of each device:  python benchmarks/results.py [--print]"""

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
VERSIONS = ("device", "driver", "torch", "triton", "python")
HEAD = ("", "mode", "dtype", "batch", "eager ms", "best peer", "fastvit ms", "vs eager", "vs peer", "memory", "error")
OURS = ("fastvit", "eager")  # and what is made of these: the others are peers


def results() -> Iterator[dict[str, Any]]:
    """The files of each device with its newest one's versions, as one; a case timed again counts as timed last."""
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        files = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        files = [result for result in files if result.get("kind") != "accuracy"]  # no timings
        if not files:
            continue
        files.sort(key=lambda result: result["machine"]["date"], reverse=True)
        newest = files[0]["machine"]
        same = [result for result in files if all(result["machine"].get(key) == newest.get(key) for key in VERSIONS)]
        yield {"machine": newest, "folder": folder.name, "commits": _commits(same), "cases": _newest_cases(same)}


def _commits(files: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(result["machine"]["commit"] for result in files))


def _newest_cases(files: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for result in files:
        for case in cases(result["rows"]):
            found.setdefault(_key(case["fastvit"]), case)
    return [found[key] for key in sorted(found, key=_order)]


def _key(row: dict[str, Any]) -> tuple:
    return row.get("op") or "", row.get("model") or "", row["mode"], row["dtype"], row["batch"]


def _order(key: tuple) -> tuple:
    """Models after ops, float32 first."""
    op, model, mode, dtype, batch = key
    return bool(model), dtype != "float32", mode == "train", op, model, mode, dtype, batch


def section(result: dict[str, Any]) -> list[str]:
    """One device: a line that says what it was measured on, and a table."""
    machine = result["machine"]
    versions = [f"torch {machine['torch']}", f"triton {machine['triton']}", f"Python {machine['python']}"]
    if machine.get("driver"):
        versions.append(f"driver {machine['driver']}")
    made = f"commit {', '.join(result['commits'])}; {machine['date'][:10]}"
    lines = [f"**{machine['device']}** (`{result['folder']}`), {', '.join(versions)}; {made}.", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * 4 + "---:|" * (len(HEAD) - 4)]
    return lines + ["| " + " | ".join(line(case)) + " |" for case in result["cases"]] + [""]


def cases(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Rows timed together, by provider; of a case timed more than once, the run with most providers."""
    together: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (*_key(row), row.get("job"))
        together.setdefault(key, {})[row["provider"]] = row
    best: dict[tuple, dict[str, dict[str, Any]]] = {}
    for key, case in together.items():
        if "fastvit" in case and len(case) > len(best.get(key[:-1], ())):
            best[key[:-1]] = case
    return list(best.values())


def line(case: dict[str, dict[str, Any]]) -> list[str]:
    ours, eager = case["fastvit"], case.get("eager")
    peers = [row for name, row in case.items() if name.split("-")[0] not in OURS]
    peer = min(peers, key=lambda row: row["p50_ms"], default=None)
    return [
        ours.get("op") or ours["model"],
        ours["mode"],
        ours["dtype"],
        str(ours["batch"]),
        milliseconds(eager) if eager else "-",
        f"{milliseconds(peer)} {peer['provider']}" if peer else "-",
        milliseconds(ours),
        *(f"{faster(row, ours):.2f}x" if row else "-" for row in (eager, peer)),
        share(ours, eager, "peak_mb"),
        share(ours, eager, "error"),
    ]


def milliseconds(row: dict[str, Any]) -> str:
    """Three digits, as 3.53, 98.8 or 1898."""
    value = row["p50_ms"]
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def faster(other: dict[str, Any], ours: dict[str, Any]) -> float:
    return statistics.median(ratio_by_round(other["raw_ms"], ours["raw_ms"]))


def share(ours: dict[str, Any], eager: dict[str, Any] | None, key: str) -> str:
    """Ours over eager's."""
    return f"{ours[key] / eager[key]:.2f}x" if eager and ours[key] and eager[key] else "-"


def main() -> int:
    gpus_first = sorted(results(), key=lambda result: "capability" not in result["machine"])
    text = [line for result in gpus_first for line in section(result)]
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
