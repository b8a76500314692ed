"""Pictures to classes, features or nearest neighbours.

Without --checkpoint a trained ViT-S/14 is used (fetched once): it gives features, and each picture's nearest
neighbours in a gallery: a folder with one sub-folder of pictures per class, or 19 photos with ImageNet's class indices.
A picture that cannot be read ends the command with 2 before anything is written.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from . import _common
from .convert import head_size

KINDS = ("classes", "features", "nearest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, or folders of pictures")
    parser.add_argument("--model", help=f"as vit_base_patch16_224 (default: {data.TRAINED_MODEL}, trained)")
    parser.add_argument("--checkpoint", type=Path, help="weights of --model")
    parser.add_argument("--size", type=_common.at_least_one, help="image side (default: 224, or the model's own)")
    parser.add_argument(
        "--crop-pct", type=float, default=1.0, help="share of the shorter side that is kept (default: 1)"
    )
    parser.add_argument("--as", dest="kind", choices=KINDS, help="default: classes with a head, else nearest")
    parser.add_argument("--gallery", type=Path, metavar="DIR", help="where to look for nearest neighbours")
    parser.add_argument("--top", type=_common.at_least_one, default=5, help="answers a picture (default: 5)")
    parser.add_argument("--batch", type=_common.at_least_one, default=16, help="default: 16")
    parser.add_argument("--dtype", type=_common.dtype_of, default=torch.float32, help="default: float32")
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    _common.add_device(parser)
    _common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    device = _common.pick_device(args)
    with _common.wrong_inputs():
        paths = data.find_pictures(args.pictures)
        gallery = None if args.gallery is None else _labelled(args.gallery)
    vit = _load(args)
    vit.model.to(device, args.dtype).eval()
    kind = args.kind or ("classes" if vit.model.num_classes else "nearest")
    if kind == "classes" and not vit.model.num_classes:
        raise _common.Failure("--as classes: the model has no classifier; give --checkpoint with one, or another kind")
    pictures = vit.read(paths)
    with _common.busy(f"{len(paths)} pictures"):
        if kind == "classes":
            answers = _classes(vit.forward(pictures, args.batch), args.top)
        elif kind == "features":
            answers = [{"features": row.tolist()} for row in vit.forward(pictures, args.batch, pre_logits=True)]
        else:
            answers = _nearest(vit, pictures, gallery or _photos(args), args)
    rows = [{"picture": str(path), **answer} for path, answer in zip(paths, answers, strict=True)]
    result = {"model": args.model or data.TRAINED_MODEL, "kind": kind, "image_size": vit.side, "rows": rows}
    _common.report(args, result, [_table(kind, rows)] if args.json != "-" else ())
    return _common.FINE


@dataclass(frozen=True)
class _Vit:
    """A model, and how it wants its pictures."""

    model: Any  # a VisionTransformer
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float

    def read(self, paths: list[Path]) -> Tensor:
        """(n, 3, side, side) uint8; all that cannot be read are named at once."""
        found, wrong = [], []
        for path in paths:
            try:
                found.append(data.preprocess([data.open_picture(path)], self.side, self.crop_pct))
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            raise _common.Failure("\n".join(wrong))
        return torch.cat(found)

    def forward(self, pictures: Tensor, batch: int, pre_logits: bool = False) -> Tensor:
        """(n, classes) logits, or (n, E) features, float32 on the CPU."""
        weight = next(self.model.parameters())
        found = []
        with torch.inference_mode():
            for chunk in pictures.split(batch):
                pixels = data.normalize(chunk.to(weight.device), weight.dtype, self.mean, self.std)
                tokens = self.model.forward_features(pixels)
                found.append(self.model.forward_head(tokens, pre_logits=pre_logits).float().cpu())
        return torch.cat(found)


def _load(args: argparse.Namespace) -> _Vit:
    """The model with its weights."""
    from ..checkpoints import read_state_dict
    from ..model import create_model

    if not 0 < args.crop_pct <= 1:
        raise _common.Failure(f"--crop-pct {args.crop_pct}: expected a share above 0, at most 1")
    options: dict[str, Any] = {} if args.size is None else {"img_size": args.size}
    if args.checkpoint is None:
        if args.model is not None:
            raise _common.Failure(f"--model {args.model} needs --checkpoint: random weights predict nothing")
        trained = data.trained_vit(offline=args.offline)
        options = {"img_size": 224} | options | {"num_classes": 0, "checkpoint_path": trained}
    elif args.model is None:
        raise _common.Failure("--checkpoint needs --model: the name of the architecture it is for")
    else:
        options["checkpoint_path"] = args.checkpoint
    with _common.wrong_inputs():
        if args.checkpoint is not None:
            options["num_classes"] = head_size(read_state_dict(args.checkpoint))
        model = create_model(args.model or data.TRAINED_MODEL, **options)
    wanted: Any = model.pretrained_cfg
    return _Vit(model, model.patch_embed.img_size[0], wanted["mean"], wanted["std"], args.crop_pct)


def _classes(logits: Tensor, top: int) -> list[dict[str, Any]]:
    shares, classes = logits.softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
    return [
        {"classes": [{"class": c, "probability": p} for c, p in zip(cs, ps, strict=True)]}
        for cs, ps in zip(classes.tolist(), shares.tolist(), strict=True)
    ]


def _nearest(
    vit: _Vit, pictures: Tensor, gallery: list[tuple[Path, str]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    known = vit.read([path for path, _ in gallery])
    unit, known = (
        nn.functional.normalize(vit.forward(group, args.batch, pre_logits=True), dim=-1) for group in (pictures, known)
    )
    similarity, nearest = (unit @ known.T).topk(min(args.top, len(gallery)), dim=-1)
    return [
        {
            "nearest": [
                {"picture": str(gallery[i][0]), "class": gallery[i][1], "similarity": s}
                for i, s in zip(indices, similarities, strict=True)
            ]
        }
        for indices, similarities in zip(nearest.tolist(), similarity.tolist(), strict=True)
    ]


def _labelled(folder: Path) -> list[tuple[Path, str]]:
    """Pictures under ``folder``, each with the name of the folder it is in."""
    if not folder.is_dir():
        raise ValueError(f"--gallery {folder}: there is no such folder")
    return [(path, path.parent.name) for path in data.find_pictures([folder])]


def _photos(args: argparse.Namespace) -> list[tuple[Path, str]]:
    return [(photo.path, str(photo.label)) for photo in data.photos(offline=args.offline)]


def _table(kind: str, rows: list[dict[str, Any]]) -> Any:
    cells = []
    for row in rows:
        if kind == "classes":
            answer = ", ".join(f"{found['class']} ({found['probability']:.1%})" for found in row["classes"])
        elif kind == "nearest":
            answer = ", ".join(f"{found['class']} ({found['similarity']:.2f})" for found in row["nearest"])
        else:
            start = ", ".join(f"{value:.3f}" for value in row["features"][:4])
            answer = f"{len(row['features'])} values: {start}, ..."
        cells.append([row["picture"], answer])
    return _common.table("Predictions", ("picture", kind), cells)
