"""Write the tables of every device's result files:  python benchmarks/results.py [--check]

README.md gets whole models (single ops where a device has no more), benchmarks/results/README.md gets every row.
"""

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
EVERY_ROW = RESULTS / "README.md"
BEGIN, END = "<!-- results:begin (make results) -->", "<!-- results:end -->"
VERSIONS = ("device", "driver", "torch", "triton", "python")
HEAD = ("", "mode", "dtype", "batch", "eager ms", "best peer", "fastvit ms", "vs eager", "vs peer", "memory", "error")
OURS = ("fastvit", "eager")  # and what is made of these: the others are peers
VARIANTS = {"graph": "eager-graph", "autocast": "eager-autocast", "lean": "eager"}  # of fastvit, each beside its stock


def results() -> Iterator[dict[str, Any]]:
    """The files of each device with its newest one's versions, as one; a case timed again counts as timed last."""
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        files = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        files = [result for result in files if "kind" not in result]  # of timings
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
    return bool(model), dtype != "float32", mode.startswith("train"), op, model, mode, dtype, batch


def headlines(result: dict[str, Any]) -> dict[str, Any]:
    """The same device with its whole models alone."""
    return result | {"cases": [case for case in result["cases"] if "model" in case["fastvit"]]}


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
    return [each for case in best.values() for each in (case, *variants(case))]


def variants(case: dict[str, dict[str, Any]]) -> Iterator[dict[str, dict[str, Any]]]:
    """What else of ours was timed in the run, each as a mode of its own."""
    for name, stock in VARIANTS.items():
        if f"fastvit-{name}" in case and stock in case:
            mode = {"mode": f"{case['fastvit']['mode']}, {name}"}
            yield {"fastvit": case[f"fastvit-{name}"] | mode, "eager": case[stock] | mode}


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


MEANING = """\
Times are medians; ratios are medians of ratios taken within interleaved rounds; memory and error are
fastvit's over eager's, the error against float64."""


def every_row(devices: list[dict[str, Any]]) -> str:
    head = [
        "# Every row",
        "",
        "Written by `make results`.",
        MEANING,
        "Raw samples are in the files beside this one.",
        "",
    ]
    return "\n".join(head + [line for result in devices for line in section(result)])


def readme(devices: list[dict[str, Any]]) -> str | None:
    """README.md with the tables as they should be; None where it has no place for them."""
    with_models = filter(lambda result: result["cases"], map(headlines, devices))
    text = [line for result in with_models for line in section(result)]
    text += [MEANING, "Single ops: [benchmarks/results](benchmarks/results/README.md), with every raw sample."]
    before, _, rest = README.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    return before + "\n".join([BEGIN, *text, END]) + after if found else None


def main() -> int:
    devices = sorted(results(), key=lambda result: "capability" not in result["machine"])  # GPUs first
    texts = {README: readme(devices), EVERY_ROW: every_row(devices)}
    if texts[README] is None:
        print(f"results: README.md has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"results: {path.relative_to(ROOT)} does not say what the files say: run make results")
        return int(bool(stale))
    for path in stale:
        path.write_text(texts[path] or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
