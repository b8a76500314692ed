"""What the commands share: exit codes, arguments, tables, and files written whole or not at all."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..data import atomic_write

FINE, MISSED, USAGE, MISSING = 0, 1, 2, 3

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class Failure(Exception):
    """Ends a command with a message and an exit code."""

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


@contextmanager
def wrong_inputs() -> Iterator[None]:
    """Errors about what the user gave end the command with one line, not a traceback."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise Failure(str(error.args[0]) if isinstance(error, KeyError) else str(error)) from error


def need(module: str, purpose: str, extra: str = "cli") -> Any:
    """Import an optional package, or end the command saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise Failure(f"{purpose} needs {package}: pip install 'fastvit[{extra}]' ({error})", MISSING) from error


def dtype_of(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtypes_of(names: str) -> list[torch.dtype]:
    return [dtype_of(name) for name in names.split(",")]


def names_of(text: str) -> list[str]:
    """A list separated by commas."""
    return [name for name in text.split(",") if name]


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def sizes_of(text: str) -> list[int]:
    return [at_least_one(size) for size in text.split(",")]


def json_target(text: str) -> str:
    """A name that ends in .json, so that a slip never overwrites a picture or a checkpoint."""
    if text != "-" and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither '-' (standard output) nor a name ending in .json")
    return text


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=json_target,
        metavar="FILE",
        help="write the report as JSON; alone or with '-', to standard output and nothing else",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:<i>")
    parser.add_argument("--threads", type=at_least_one, help="CPU threads (default: torch's choice)")


def pick_device(args: argparse.Namespace) -> torch.device:
    """The device ``args`` asks for; also sets the number of threads."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Failure(f"--device {name}: expected auto, cpu, cuda or cuda:<i>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Failure(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here", MISSING)
    return device


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_json(target: str | Path, report: dict) -> None:
    """``report`` as strict JSON (NaN and infinity become null) to a file, whole or not at all, or to '-'."""
    text = json.dumps(_finite(report), indent=2) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_file(Path(target), text.encode())


def write_file(path: Path, content: bytes) -> None:
    try:
        with atomic_write(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror or error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def console() -> Any:
    """A rich console, wide where nobody's terminal limits it."""
    made = need("rich.console", "showing tables").Console(highlight=False)
    if not made.is_terminal:
        made.width = 200
    return made


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A rich table; columns whose name starts with '>' are aligned right."""
    box = need("rich.box", "showing tables").SIMPLE_HEAD
    style = {
        "title": title,
        "title_justify": "left",
        "title_style": "bold",
        "box": box,
        "show_header": any(columns),
        "padding": (0, 1),
    }
    made = need("rich.table", "showing tables").Table(**style)
    for index, column in enumerate(columns):
        if column.startswith(">"):
            made.add_column(column[1:], justify="right", min_width=max((len(row[index]) for row in rows), default=0))
        else:
            made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def report(args: argparse.Namespace, result: dict, tables: Sequence[Any] = ()) -> None:
    """Write ``--json``, and show the tables unless standard output carries the JSON."""
    if args.json:
        write_json(args.json, result)
    if args.json != "-":
        for item in tables:
            console().print(item)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on standard error while something runs; nothing where rich is missing or nobody looks."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield
        return
    with need("rich.console", "progress").Console(stderr=True).status(f"{what} ..."):
        yield
