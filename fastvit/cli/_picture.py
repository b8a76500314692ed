"""demo.png: the whole result of the demo on one page."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import CIFAR10_CLASSES
from . import _common

STOCK, OURS, GOOD, BAD, INK, PAPER = "#9aa5b1", "#2563eb", "#16a34a", "#dc2626", "#1f2933", "#ffffff"
_MODES = {"infer": "inference", "train": "training step"}


def feature_map(stock: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """The first three principal components of one picture's patch tokens (L, E) as colours (side, side, 3).

    The axes come from ``stock`` alone, so any difference between the two would show as a difference in colour.
    """
    centre = stock.mean(dim=0)
    axes = torch.linalg.svd(stock - centre, full_matrices=False).Vh[:3]
    projected = [(tokens - centre) @ axes.T for tokens in (stock, ours)]
    low, high = projected[0].quantile(0.02, dim=0), projected[0].quantile(0.98, dim=0)
    side = round(len(stock) ** 0.5)
    colours = [((p - low) / (high - low)).clamp(0, 1).view(side, side, 3) for p in projected]
    return colours[0], colours[1]


def draw(path: Path, result: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Write the page, whole or not at all.

    pictures  "photos" (n, 3, S, S) uint8 with "maps" (pairs of feature maps), and, where CIFAR-10 is there,
              "queries": [(picture, label, [(neighbour, label), ...]), ...]
    """
    matplotlib = _common.need("matplotlib", "drawing demo.png")
    matplotlib.use("Agg")
    plt = _common.need("matplotlib.pyplot", "drawing demo.png")
    style = {"font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.spines.top": False}
    with plt.rc_context(style | {"axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11}):
        figure = plt.figure(figsize=(15, 10.6), facecolor=PAPER)
        _headline(figure, result)
        areas = figure.add_gridspec(
            2, 2, width_ratios=(1.45, 1), height_ratios=(1, 1), left=0.035, right=0.975, top=0.875, bottom=0.055,
            wspace=0.28, hspace=0.22,
        )  # fmt: skip
        _photos(figure, areas[0, 0], pictures)
        _neighbours(figure, areas[1, 0], pictures, result)
        _errors(figure.add_subplot(areas[0, 1]), result["certificate"])
        _speed(figure.add_subplot(areas[1, 1]), result["throughput"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, facecolor=PAPER)
        plt.close(figure)
    _common.write_file(path, buffer.getvalue())


def _headline(figure: Any, result: dict[str, Any]) -> None:
    machine = result["machine"]
    figure.text(0.035, 0.955, "fastvit", fontsize=24, weight="bold", color=OURS)
    figure.text(0.125, 0.957, f"stock PyTorch and fastvit side by side on a {result['weights']}", fontsize=17)
    facts = f"{machine['device']}, CPU threads: {machine['cores']}, torch {machine['torch']}"
    facts += f"; stock is {result['stock']}"
    figure.text(0.035, 0.925, facts, fontsize=10, color="#52606d")


def _photos(figure: Any, area: Any, pictures: dict[str, Any]) -> None:
    photos, maps = pictures["photos"], pictures["maps"]
    grid = area.subgridspec(3, len(maps), wspace=0.06, hspace=0.06)
    for column, (stock, ours) in enumerate(maps):
        for row, shown in enumerate((photos[column].permute(1, 2, 0), stock, ours)):
            axes = _bare(figure.add_subplot(grid[row, column]))
            axes.imshow(shown.numpy(), interpolation="nearest" if row else None)
            if column == 0:
                axes.set_ylabel(("picture", "stock", "fastvit")[row], fontsize=10.5)
            if column == row == 0:
                axes.set_title("What the model sees: its patch features as colours")


def _neighbours(figure: Any, area: Any, pictures: dict[str, Any], result: dict[str, Any]) -> None:
    if "queries" not in pictures:
        axes = _bare(figure.add_subplot(area))
        axes.text(0.5, 0.5, "k-NN on CIFAR-10 was left out", ha="center", va="center", color="#52606d")
        axes.axis("off")
        return
    knn, queries = result["knn"], pictures["queries"]
    per_row = len(queries[0][2])
    grid = area.subgridspec(len(queries), per_row + 2, wspace=0.08, hspace=0.12, width_ratios=[1, 0.12, *[1] * per_row])
    for row, (query, label, found) in enumerate(queries):
        axes = _bare(figure.add_subplot(grid[row, 0]))
        axes.imshow(query.permute(1, 2, 0).numpy(), interpolation="bicubic")
        axes.set_ylabel(CIFAR10_CLASSES[label], fontsize=10)
        if row == 0:
            accuracies = f"stock {knn['accuracy_stock']:.1%}, fastvit {knn['accuracy_fastvit']:.1%}"
            differ = f"{knn['different_predictions']} of {knn['test_images']} predictions differ"
            axes.set_title(f"CIFAR-10 and its nearest training pictures. {knn['k']}-NN: {accuracies}; {differ}")
        for column, (picture, its_label) in enumerate(found):
            axes = _bare(figure.add_subplot(grid[row, column + 2]), GOOD if its_label == label else BAD)
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="bicubic")


def _errors(axes: Any, certificate: dict[str, Any]) -> None:
    """Root-mean-square errors of the worst rows, on a logarithmic scale."""
    rows = certificate["worst"]
    names = [f"{'forward' if row['name'] == 'output' else 'worst gradient'}\n{row['dtype']}" for row in rows]
    measured = [(row["rms_error_eager"], row["rms_error"]) for row in rows]
    # NaN and infinity have no place on an axis: the bar is then the longest, the label says what it is
    worst = max((error for pair in measured for error in pair if math.isfinite(error)), default=1.0)
    errors = [(_or(stock, worst), _or(ours, worst)) for stock, ours in measured]
    _pairs(axes, names, errors, [(f"{stock:.1e}", f"{ours:.1e}") for stock, ours in measured])
    axes.set_xscale("log")
    axes.set_xlim(max(min(map(min, errors)), 1e-12) / 10, max(map(max, errors)) * 30)
    axes.set_xlabel("rms error against float64")
    verdict, colour = ("passed", GOOD) if certificate["passed"] else ("MISSED", BAD)
    axes.set_title(f"As accurate as stock PyTorch: certificate {verdict}", color=colour)
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(0.98, 0.985), ncols=2)


def _or(error: float, otherwise: float) -> float:
    return error if math.isfinite(error) else otherwise


def _speed(axes: Any, rows: list[dict[str, Any]]) -> None:
    both = list(zip(*([row for row in rows if row["provider"] == name] for name in ("stock", "fastvit")), strict=True))
    names = [f"{_MODES[ours['mode']]}, batch {ours['batch']}\n{ours['dtype']}" for _, ours in both]
    rates = [(stock["images_per_s"], ours["images_per_s"]) for stock, ours in both]
    _pairs(axes, names, rates, [(_rate(stock["images_per_s"]), _speed_label(stock, ours)) for stock, ours in both])
    axes.set_xlim(0, max(map(max, rates)) * 1.6)
    slowest = min(ours["speedup"] for _, ours in both)
    side = both[0][0]["image_size"]
    axes.set_title(f"{'Faster' if slowest > 1 else 'Speed'}, {side} px: images/s, speedup, peak memory")


def _speed_label(stock: dict[str, Any], ours: dict[str, Any]) -> str:
    text = f"{_rate(ours['images_per_s'])}   {ours['speedup']:.2f}x"
    if stock["peak_mb"] is not None and ours["peak_mb"] is not None:
        text += f"   {ours['peak_mb']:.0f} of {stock['peak_mb']:.0f} MB"
    return text


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _pairs(axes: Any, names: list[str], values: list[tuple[float, float]], labels: list[tuple[str, str]]) -> None:
    """Horizontal bars, stock above fastvit, each with its label."""
    for side, (colour, provider) in enumerate(((STOCK, "stock"), (OURS, "fastvit"))):
        places = [i + (side - 0.5) * 0.38 for i in range(len(names))]
        axes.barh(places, [pair[side] for pair in values], height=0.34, color=colour, label=provider)
        for place, pair, texts in zip(places, values, labels, strict=True):
            axes.text(pair[side], place, f"  {texts[side]}", va="center", fontsize=9, weight="bold" if side else None)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def _bare(axes: Any, frame: str | None = None) -> Any:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=2.5)
    return axes
