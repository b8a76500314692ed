"""The main job on real input: a trained ViT-S/14 on photos and CIFAR-10, stock PyTorch beside fastvit.

Writes demo.png and demo.json: the parity certificate on the photos, speed and memory, and k-NN accuracy on CIFAR-10
with the features of both. Ends with 1 when the certificate is missed or one prediction differs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data, parity
from . import _common, _knn, _measure, _picture
from ._stock import stock_model
from .parity import certificate, worst_rows

KNN = 20
QUERIES, NEIGHBOURS = 5, 7
SHOWN_PHOTOS = (15, 16, 2, 14, 18, 1)


@dataclass(frozen=True)
class Sizes:
    """How much work the demo does."""

    certificate_photos: int = 19
    certificate_px: int = 224
    speed_px: int = 224
    speed: tuple[tuple[str, int], ...] = (("infer", 1), ("infer", 16), ("train", 8))
    rounds: int = 7
    knn_px: int = 112
    train: int = 3000
    test: int = 1000
    batch: int = 50


FULL = Sizes()
QUICK = Sizes(1, 56, 56, (("infer", 1), ("train", 2)), 2, 28, 60, 20, 20)


@dataclass
class Inputs:
    """What was found; ``left_out`` says what was not, and why."""

    weights: Path | None = None
    photos: list[data.Photo] = field(default_factory=list)
    cifar: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    left_out: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    parser.add_argument(
        "--offline",
        action="store_true",
        default=os.environ.get("OFFLINE", "0") not in ("", "0"),
        help="fetch nothing: use what is cached or installed, say what is left out (also OFFLINE=1)",
    )
    parser.add_argument("--quick", action="store_true", help="a minute's worth of the same, on tiny sizes")
    parser.add_argument("--certificate-only", action="store_true", help="no speed, no CIFAR-10, no demo.png")
    _common.add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = _common.pick_device(args)
    if not args.certificate_only:
        _common.need("matplotlib", "drawing demo.png")
    screen, sizes = _common.console(), QUICK if args.quick else FULL
    _make_folder(args.out)
    inputs = _gather(args, sizes, screen)
    for reason in inputs.left_out:
        screen.print(f"[yellow]left out[/] {reason}")

    torch.manual_seed(0)
    photos = _photos(inputs, sizes)
    models, stock_kind = _models(inputs, sizes.certificate_px, device)
    result: dict[str, Any] = {
        "machine": parity.machine(str(device)),
        "weights": "trained ViT-S/14" if inputs.weights else "random ViT-S/14",
        "stock": stock_kind,
        "left_out": inputs.left_out,
    }
    result["certificate"] = _certificate(models["fastvit"], photos, device, screen)
    passed = result["certificate"]["passed"]
    if args.certificate_only:
        _common.write_json(args.out / "demo.json", result | {"passed": passed})
        return _common.FINE if passed else _common.MISSED
    result["throughput"] = _throughput(inputs, photos, sizes, device, screen)
    result["knn"], pictures = _neighbours(inputs, sizes, device, screen) if inputs.cifar else (None, {})
    passed = passed and (result["knn"] is None or result["knn"]["same_predictions"])
    _common.write_json(args.out / "demo.json", result | {"passed": passed})
    pictures |= _features(models, photos, device)
    _picture.draw(args.out / "demo.png", result, pictures)
    screen.print(f"Wrote {args.out / 'demo.png'} and {args.out / 'demo.json'}")
    return _common.FINE if passed else _common.MISSED


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _common.Failure(f"--out {path}: {error.strerror}") from error


def _gather(args: argparse.Namespace, sizes: Sizes, screen: Any) -> Inputs:
    """Fetch the inputs. Offline, those that are not there are left out and random ones stand in."""
    inputs = Inputs()

    @contextmanager
    def may_lack(instead: str) -> Iterator[None]:
        try:
            yield
        except data.DataError as error:
            if not args.offline:
                raise
            inputs.left_out.append(f"{error}. {instead}")

    with _download_bars(screen) as progress:
        options: dict[str, Any] = {"offline": args.offline, "progress": progress}
        with may_lack("Random weights stand in"):
            inputs.weights = data.trained_vit(**options)
        with may_lack("Random pictures stand in"):
            inputs.photos = data.photos(**options)
        if args.certificate_only:
            return inputs
        with may_lack("No k-NN accuracy"):
            inputs.cifar = (
                *data.cifar10("train", sizes.train, **options),
                *data.cifar10("test", sizes.test, **options),
            )
    return inputs


@contextmanager
def _download_bars(screen: Any) -> Iterator[data.Progress]:
    rich = _common.need("rich.progress", "progress")
    columns = (rich.TextColumn("fetching {task.description}"), rich.BarColumn(), rich.DownloadColumn())
    with rich.Progress(*columns, console=screen) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield progress


def _models(inputs: Inputs, size: int, device: torch.device) -> tuple[dict[str, nn.Module], str]:
    """Stock and fastvit with the same weights, at one image size."""
    from ..model import create_model

    torch.manual_seed(0)
    ours = create_model(data.TRAINED_MODEL, img_size=size, num_classes=0, checkpoint_path=inputs.weights)
    ours = ours.to(device).eval()
    stock, kind = stock_model(data.TRAINED_MODEL, ours, size)
    return {"stock": stock, "fastvit": ours}, kind


def _photos(inputs: Inputs, sizes: Sizes) -> Tensor:
    """(n, 3, S, S) uint8."""
    count, side = sizes.certificate_photos, sizes.certificate_px
    if not inputs.photos:
        smooth = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
        return data.resize(smooth, side)
    return data.preprocess((data.open_picture(photo.path) for photo in inputs.photos[:count]), side)


def _certificate(model: nn.Module, photos: Tensor, device: torch.device, screen: Any) -> dict[str, Any]:
    with screen.status("1/3 certificate: forward and every gradient against float64 ..."):
        result = parity.parity_report(
            model, data.normalize(photos), device=str(device), op_names=(), name=data.TRAINED_MODEL
        )
    screen.print(certificate(result))
    return {"passed": result["passed"], "worst": worst_rows(result["rows"]), "rows": result["rows"]}


def _throughput(
    inputs: Inputs, photos: Tensor, sizes: Sizes, device: torch.device, screen: Any
) -> list[dict[str, Any]]:
    models, _ = _models(inputs, sizes.speed_px, device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        models = {provider: model.to(dtype) for provider, model in models.items()}
        for mode, batch in sizes.speed:
            with screen.status(f"2/3 speed: {mode}, batch {batch}, {_common.dtype_name(dtype)} ..."):
                chosen = photos[torch.arange(batch) % len(photos)]
                pixels = data.normalize(data.resize(chosen, sizes.speed_px), dtype).to(device)
                rows += _measure.compare(models, pixels, mode, sizes.rounds)
    columns = ("", "dtype", ">batch", "", ">images/s", ">speedup", ">peak MB")
    screen.print(_common.table("Speed, side by side", columns, [_speed_cells(row) for row in rows]))
    return rows


def _speed_cells(row: dict[str, Any]) -> list[str]:
    peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    numbers = [f"{row['images_per_s']:.1f}", f"{row['speedup']:.2f}x", peak]
    return [row["mode"], row["dtype"], str(row["batch"]), row["provider"], *numbers]


def _neighbours(inputs: Inputs, sizes: Sizes, device: torch.device, screen: Any) -> tuple[dict[str, Any], dict]:
    """k-NN accuracy with the features of both models, and some queries with their neighbours to show."""
    assert inputs.cifar is not None
    train, train_labels, test, test_labels = inputs.cifar
    models, _ = _models(inputs, sizes.knn_px, device)
    predictions, accuracy, seconds = {}, {}, {}
    for provider, model in models.items():
        rich = _common.need("rich.progress", "progress")
        with rich.Progress(console=screen, transient=True) as bars:
            task = bars.add_task(f"3/3 CIFAR-10 features, {provider}", total=len(train) + len(test))
            features = [
                _knn.extract(model, images, sizes.knn_px, sizes.batch, partial(bars.advance, task))
                for images in (train, test)
            ]
            seconds[provider] = bars.tasks[0].elapsed
        predictions[provider], nearest = _knn.classify(features[0], train_labels, features[1], 10, KNN)
        accuracy[provider] = (predictions[provider] == test_labels).float().mean().item()
    different = int((predictions["stock"] != predictions["fastvit"]).sum())
    result = {
        "accuracy_stock": accuracy["stock"],
        "accuracy_fastvit": accuracy["fastvit"],
        "same_predictions": different == 0,
        "different_predictions": different,
        "k": KNN,
        "train_images": len(train),
        "test_images": len(test),
        "image_size": sizes.knn_px,
        "seconds_stock": seconds["stock"],
        "seconds_fastvit": seconds["fastvit"],
    }
    screen.print(
        f"{KNN}-NN on CIFAR-10: stock {accuracy['stock']:.1%} in {seconds['stock']:.0f} s, fastvit "
        f"{accuracy['fastvit']:.1%} in {seconds['fastvit']:.0f} s, {different} of {len(test)} predictions differ"
    )
    return result, {"queries": _queries(inputs.cifar, nearest)}


def _queries(cifar: tuple[Tensor, Tensor, Tensor, Tensor], nearest: Tensor) -> list[tuple]:
    """The first test picture of each of a few classes, with its nearest training pictures."""
    train, train_labels, test, test_labels = cifar
    classes = test_labels.unique().tolist()
    firsts = [int((test_labels == label).nonzero()[0]) for label in classes][-QUERIES:]
    return [
        (test[i], int(test_labels[i]), [(train[j], int(train_labels[j])) for j in nearest[i, :NEIGHBOURS].tolist()])
        for i in firsts
    ]


def _features(models: dict[str, Any], photos: Tensor, device: torch.device) -> dict[str, Any]:
    """Feature maps of some photos from both models."""
    shown = photos[[i for i in SHOWN_PHOTOS if i < len(photos)] or [0]]
    pixels = data.normalize(shown).to(device)
    with torch.inference_mode():
        stock, ours = (models[name].forward_features(pixels)[:, 1:].float().cpu() for name in ("stock", "fastvit"))
    return {"photos": shown, "maps": [_picture.feature_map(a, b) for a, b in zip(stock, ours, strict=True)]}
