"""Time ops and whole models against stock PyTorch, rounds interleaved, and refuse to time what is not right first.

Without --ops and --models: all ops. Ends with 1 when something was refused because its result is not accurate.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from .. import bench
from ..testing import VIT_SHAPES
from . import _common

NUMBERS = ("p50_ms", "p20_ms", "p80_ms", "tflops", "held_mb", "peak_mb", "ratio_to_eager")
MODES = ("fwd", "bwd", "full", "infer", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=_common.names_of, help=f"a,b,... of {', '.join(bench.OPS)}")
    parser.add_argument("--models", type=_common.names_of, help="a,b,... as vit_base_patch16_224")
    parser.add_argument(
        "--providers",
        type=_common.names_of,
        default=["fastvit", "eager"],
        help=f"a,b,... of {', '.join(bench.PROVIDERS)} (default: fastvit,eager)",
    )
    parser.add_argument("--mode", choices=MODES, help="default: fwd, infer for models")
    parser.add_argument("--dtype", type=_common.dtypes_of, default="float32", help="a,b,... (default: float32)")
    parser.add_argument("--batch", type=_common.sizes_of, default="8", help="a,b,... (default: 8)")
    parser.add_argument("--shape", choices=VIT_SHAPES, default="base", help="sizes of the ops (default: base)")
    parser.add_argument("--rounds", type=_common.at_least_one, default=7, help="default: 7")
    parser.add_argument("--plot", type=_png, metavar="FILE", help="also draw the times, as a .png")
    _common.add_device(parser)
    _common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    device = _common.pick_device(args)
    if args.plot:
        _common.need("matplotlib", "--plot")
    with _common.wrong_inputs(), _common.busy("timing"):
        runs = [
            bench.run(
                ops=args.ops,
                models=args.models,
                providers=args.providers,
                dtype=dtype,
                batch=batch,
                mode=args.mode,
                device=str(device),
                threads=args.threads,
                rounds=args.rounds,
                shape=args.shape,
            )
            for dtype in args.dtype
            for batch in args.batch
        ]
        result = runs[0] | {key: [entry for run in runs for entry in run[key]] for key in ("rows", "refused")}
    _common.report(args, result, _tables(result) if args.json != "-" else ())
    if args.plot:
        _plot(args.plot, result)
    return _common.MISSED if any(not entry.get("missing") for entry in result["refused"]) else _common.FINE


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


def _tables(result: dict[str, Any]) -> list[Any]:
    machine, rows = result["machine"], result["rows"]
    columns = (
        "of",
        "provider",
        "mode",
        "dtype",
        ">batch",
        ">p50 ms",
        ">p20",
        ">p80",
        ">TFLOP/s",
        ">held MB",
        ">peak MB",
        ">vs eager",
        ">vs best peer",
        ">error",
    )
    cells = [
        [
            row.get("op") or row["model"],
            row["provider"],
            row["mode"],
            row["dtype"],
            str(row["batch"]),
            *(_number(row.get(key)) for key in NUMBERS),
            _number(row.get("ratio_to_best_peer")) + (f" {row['best_peer']}" if "best_peer" in row else ""),
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    title = f"{machine['device']}, {machine['cores']} threads, torch {machine['torch']}"
    tables = [_common.table(title, columns, cells)]
    if refused := result["refused"]:
        reasons = [[entry.get("op") or entry["model"], entry["provider"], entry["reason"]] for entry in refused]
        tables.append(_common.table("[red]Not timed[/]", ("of", "provider", "why"), reasons))
    return tables


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _subject(row: dict[str, Any]) -> str:
    return f"{row.get('op') or row['model']}\n{row['mode']}, {row['dtype']}, batch {row['batch']}"


def _plot(path: Path, result: dict[str, Any]) -> None:
    matplotlib = _common.need("matplotlib", "--plot")
    matplotlib.use("Agg")
    plt = _common.need("matplotlib.pyplot", "--plot")
    rows = result["rows"]
    subjects = list(dict.fromkeys(map(_subject, rows)))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(subjects) * (len(providers) + 1)), layout="constrained")
    for index, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        places = [subjects.index(_subject(row)) + 0.8 * index / len(providers) for row in mine]
        bars = axes.barh(places, [row["p50_ms"] for row in mine], height=0.75 / len(providers), label=provider)
        axes.bar_label(bars, [f" {_number(row['p50_ms'])}" for row in mine], fontsize=8)
    axes.set_yticks([i + 0.4 * (len(providers) - 1) / len(providers) for i in range(len(subjects))], subjects)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("median ms" if rows else "nothing was timed")
    axes.legend(frameon=False)
    axes.set_title(result["machine"]["device"], loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    _common.write_file(path, buffer.getvalue())
