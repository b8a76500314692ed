"""The parity certificate: every op and whole models, forward and every gradient, against float64.

Each row compares three runs of the same mathematics: ``exact`` (fastvit.reference in float64), stock PyTorch in the
tested dtype, and fastvit in that dtype. A row passes when fastvit's error is within the gates of
``fastvit.testing.judge``, in the maximum and in the root mean square.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .dispatch import OPS, recording, use_backend
from .relabel import OUTPUT, embed_axes, orders, relabel, relabelled
from .testing import VIT_SHAPES, Errors, Shape, cast_inputs, errors, judge, make_inputs, run_with_gradients

DTYPES = (torch.float32, torch.bfloat16)
STOCK_RUNS = 8


def parity_report(
    model: nn.Module | None = None,
    images: Tensor | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str = "cpu",
    op_names: Iterable[str] = tuple(OPS),
    shape: Shape = VIT_SHAPES["base"],
    batch: int = 2,
    name: str = "model",
) -> dict[str, Any]:
    """Measure the ops at ``shape`` and, when given, ``model`` on ``images``.

    model     a fastvit.VisionTransformer or an accelerated one; it is copied and left as it was
    images    (B, C, IH, IW) float, what ``model`` takes
    returns   {"passed": bool, "rows": [...], "machine": {...}}, ready for JSON; a row holds what was compared
              ("op" or "model", "name", "dtype", "backend"), both errors, both limits and "passed"
    """
    rows = []
    for dtype in dtypes:
        for op in op_names:
            rows += op_rows(op, shape, batch, dtype, device)
        if model is not None:
            if images is None:
                raise ValueError("parity_report: images is None, expected (B, C, IH, IW) images for the model")
            rows += model_rows(model, images, dtype, device, name)
    return {"passed": bool(rows) and all(row["passed"] for row in rows), "rows": rows, "machine": machine(device)}


def op_rows(op: str, shape: Shape, batch: int, dtype: torch.dtype, device: str = "cpu") -> list[dict[str, Any]]:
    """Rows for one op: its output and the gradient of every input."""
    inputs = make_inputs(op, shape, batch, dtype, device)
    exact_inputs = cast_inputs(inputs, torch.float64)
    meaning = getattr(reference, op)
    with torch.no_grad():
        size = meaning(**exact_inputs).shape
    grad_output = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    exact = run_with_gradients(meaning, exact_inputs, grad_output)
    with use_backend("torch"):
        stock = run_with_gradients(getattr(ops, op), inputs, grad_output)
    with recording() as calls:
        ours = run_with_gradients(getattr(ops, op), inputs, grad_output)
    labels = {"op": op, "dtype": _short(dtype), "backend": calls[0][1], "shape": [batch, shape.tokens, shape.embed_dim]}
    return [_row(labels | {"name": key}, ours[key], errors(stock[key], exact[key]), exact[key]) for key in exact]


def model_rows(
    model: nn.Module, images: Tensor, dtype: torch.dtype, device: str = "cpu", name: str = "model"
) -> list[dict[str, Any]]:
    """Rows for a whole model: its output and the gradient of every parameter.

    Stock's error is the largest of ``STOCK_RUNS`` orders of the embedding channels (``fastvit.relabel`` says why). For
    a model with parameters that timm's ViT does not have, it is that of the model as it is.
    """
    model = copy.deepcopy(model).to(device, dtype).eval()
    images = images.detach().to(device, dtype)
    with use_backend("reference"):
        exact = output_and_gradients(copy.deepcopy(model).double(), images.double())
    runs = stock_runs(model, images, exact)
    stock = worst_of(runs)
    with recording() as calls:
        ours = output_and_gradients(model, images)
    backends = {op: sorted({backend for called, backend in calls if called == op}) for op, _ in calls}
    labels = {
        "model": name,
        "dtype": _short(dtype),
        "backend": backends,
        "shape": list(images.shape),
        "stock_runs": len(runs),
    }
    return [_row(labels | {"name": key}, ours[key], stock[key], exact[key]) for key in exact]


def stock_runs(
    model: nn.Module, images: Tensor, exact: dict[str, Tensor], count: int = STOCK_RUNS
) -> list[dict[str, Errors]]:
    """Errors of stock PyTorch in ``count`` orders of the embedding channels, the model's own first.

    Only that one for a model with parameters that timm's ViT does not have.
    """
    with use_backend("torch"):
        own = output_and_gradients(model, images)
        runs = [{key: errors(value, exact[key]) for key, value in own.items()}]
        axes = embed_axes(model)
        if axes is None:
            return runs
        for order in orders(model, axes, count)[1:]:
            run = output_and_gradients(relabelled(model, axes, order), images, axes[OUTPUT], order)
            back = order.argsort()
            named = {key: relabel(value, axes[key.removeprefix("grad_")], back) for key, value in run.items()}
            runs.append({key: errors(value, exact[key]) for key, value in named.items()})
            if not runs[-1][OUTPUT].rms <= 16 * max(runs[0][OUTPUT].rms, torch.finfo(images.dtype).tiny):
                raise RuntimeError("parity: the model with its channels in another order computes something else")
    return runs


def worst_of(runs: Sequence[dict[str, Errors]]) -> dict[str, Errors]:
    return {key: Errors(max(run[key].max for run in runs), max(run[key].rms for run in runs)) for key in runs[0]}


def output_and_gradients(
    model: nn.Module, images: Tensor, output_axis: int | None = None, order: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and the gradients by every parameter, in a fixed direction (relabelled by ``order``)."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output = model(images)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    direction = (direction / direction.norm()).to(output)
    if order is not None:
        direction = relabel(direction, output_axis, order)
    grads = torch.autograd.grad(output, list(wanted.values()), direction, allow_unused=True)
    used = {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return {OUTPUT: output.detach(), **used}


def _row(labels: dict[str, Any], ours: Tensor, stock: Errors, exact: Tensor) -> dict[str, Any]:
    result = judge(errors(ours, exact), stock, exact, ours.dtype)
    return {
        **labels,
        "max_error": result.max_error,
        "max_error_eager": result.max_error_eager,
        "max_limit": result.max_limit,
        "rms_error": result.rms_error,
        "rms_error_eager": result.rms_error_eager,
        "rms_limit": result.rms_limit,
        "passed": result.passed,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a measurement was made on and with."""
    facts: dict[str, Any] = {
        "device": _cpu_name(),
        "cores": torch.get_num_threads(),
        "driver": None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fastvit": _version("fastvit"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}" if names else platform.processor()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout; a copy without its history is told by FASTVIT_COMMIT."""
    here = str(Path(__file__).parent)
    return os.environ.get("FASTVIT_COMMIT") or _first_line("git", "-C", here, "rev-parse", "--short=12", "HEAD")


def _first_line(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().partition("\n")[0] or None
