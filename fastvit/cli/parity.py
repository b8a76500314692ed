"""The parity certificate: every op, and a model, forward and every gradient, measured against float64.

A row passes when fastvit's error is within twice stock PyTorch's own in the same dtype, in the maximum and in the root
mean square. Ends with 1 when a row does not.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from .. import data, parity
from ..dispatch import BACKENDS, OPS, use_backend
from ..testing import VIT_SHAPES
from . import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="also a whole model, as vit_base_patch16_224")
    parser.add_argument("--checkpoint", type=Path, help="its weights (default: random)")
    parser.add_argument("--size", type=_common.at_least_one, help="image side for --model (default: the model's own)")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="pictures for --model (default: random pixels)")
    parser.add_argument("--ops", type=_common.names_of, default=list(OPS), help="a,b,... or 'none' (default: all)")
    parser.add_argument("--shape", choices=VIT_SHAPES, default="base", help="sizes of the ops (default: base)")
    parser.add_argument("--batch", type=_common.at_least_one, default=2, help="default: 2")
    parser.add_argument("--dtype", type=_common.dtypes_of, default=list(parity.DTYPES), help="a,b,...")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="force one, where it runs")
    parser.add_argument("--all", action="store_true", help="show every row, not the worst of each kind")
    _common.add_device(parser)
    _common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    device = _common.pick_device(args)
    op_names = [] if args.ops == ["none"] else args.ops
    if unknown := [name for name in op_names if name not in OPS]:
        raise _common.Failure(f"--ops: {unknown[0]!r} is no op, expected some of {', '.join(OPS)}, or none")
    if not op_names and args.model is None:
        raise _common.Failure("--ops none without --model leaves nothing to measure")
    model, images = _model_and_images(args)
    with _common.busy("measuring against float64"), use_backend(args.backend):
        result = parity.parity_report(
            model,
            images,
            dtypes=args.dtype,
            device=str(device),
            op_names=op_names,
            shape=VIT_SHAPES[args.shape],
            batch=args.batch,
            name=args.model or "",
        )
    _common.report(args, result, [certificate(result, args.all)] if args.json != "-" else ())
    return _common.FINE if result["passed"] else _common.MISSED


def worst_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each op or model and dtype: the output, and the gradient that comes nearest to a limit."""
    kinds: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        kind = (row.get("model"), row.get("op"), row["dtype"], row["name"] == "output")
        if kind not in kinds or nearness(row) > nearness(kinds[kind]):
            kinds[kind] = row
    return list(kinds.values())


def nearness(row: dict[str, Any]) -> float:
    """The larger of both errors over their limits: above 1 the row has missed. NaN is beyond every limit."""
    shares = [_share(row["max_error"], row["max_limit"]), _share(row["rms_error"], row["rms_limit"])]
    return float("inf") if any(math.isnan(share) for share in shares) else max(shares)


def _share(error: float, limit: float) -> float:
    return error / limit if limit else float("inf") if error else 0.0


def certificate(result: dict[str, Any], every_row: bool = False) -> Any:
    """A rich table of the rows and the verdict."""
    rows = result["rows"] if every_row else worst_rows(result["rows"])
    verdict = "[green]passed[/]" if result["passed"] else "[red]MISSED[/]"
    columns = ("of", "what", "dtype", "backend", ">rms error", ">stock's", ">of limit", "")
    title = f"Certificate {verdict}: {len(result['rows'])} comparisons with float64"
    return _common.table(title, columns, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    backend = row["backend"]
    if isinstance(backend, dict):
        backend = ", ".join(sorted({name for names in backend.values() for name in names}))
    errors = [f"{row['rms_error']:.1e}", f"{row['rms_error_eager']:.1e}", f"{nearness(row):.0%}"]
    mark = "[green]ok[/]" if row["passed"] else "[red]MISSED[/]"
    return [row.get("op") or row["model"], row["name"], row["dtype"], backend, *errors, mark]


def _model_and_images(args: argparse.Namespace) -> tuple[torch.nn.Module | None, torch.Tensor | None]:
    if args.model is None:
        if args.checkpoint or args.images or args.size:
            raise _common.Failure("--checkpoint, --images and --size are about a model: give --model")
        return None, None
    from ..model import create_model

    with _common.wrong_inputs():
        sizes = {} if args.size is None else {"img_size": args.size}
        model = create_model(args.model, checkpoint_path=args.checkpoint, **sizes)
        side = model.patch_embed.img_size[0]
        if args.images:
            return model, data.normalize(data.preprocess(map(data.open_picture, args.images), side))
    return model, torch.randn(args.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
