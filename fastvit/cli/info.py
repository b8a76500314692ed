"""What this machine has, which compiled parts are loaded, and for each op which backend runs a ViT-B/16 on it."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import __version__, _extension, ops, parity, testing
from ..dispatch import OPS, explaining, use_backend
from ..ops import _sm90
from . import _common

_COST = {
    "triton": "patch embedding and attention run as stock PyTorch on a GPU",
    "cuda": "LayerNorm + MLP runs as stock PyTorch on a GPU",
    "cpp": "LayerNorm + MLP runs as stock PyTorch on the CPU",
    "hopper": "on a GPU the matrix products are cuBLAS's",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _common.add_device(parser)
    _common.add_json(parser)
    parser.add_argument("--dtype", type=_common.dtype_of, default=torch.float32, help="of the typical input")
    parser.add_argument("--batch", type=_common.at_least_one, default=1, help="of the typical input")


def run(args: argparse.Namespace) -> int:
    device = _common.pick_device(args)
    explained = {name: _explain(name, args.dtype, args.batch, device) for name in OPS}
    result = {
        "fastvit": __version__,
        "machine": parity.machine(str(device)),
        "parts": parts(),
        "typical_input": {
            "model": "ViT-B/16 at 224",
            "batch": args.batch,
            "dtype": _common.dtype_name(args.dtype),
            "device": str(device),
        },
        "ops": explained,
    }
    _common.report(args, result, _tables(result) if args.json != "-" else ())
    return _common.FINE


def parts() -> dict[str, dict[str, Any]]:
    """The compiled parts: whether each is there, why not, and what that costs."""
    absent = {
        "triton": _extension.why_not_triton(),
        "cuda": _extension.why_not_cuda(),
        "cpp": _extension.why_not_cpp(),
        "hopper": _extension.why_not_cuda() or _sm90.why_not_built(),
    }
    found: dict[str, dict[str, Any]] = {
        name: {"available": not reasons, "reasons": reasons, "costs": _COST[name] if reasons else None}
        for name, reasons in absent.items()
    }
    module = _extension.cpp()
    if module is not None:
        found["cpp"] |= {"build": dict(module.build_info()), "cpu": dict(module.cpu_capabilities())}
    return found


def _explain(name: str, dtype: torch.dtype, batch: int, device: torch.device) -> dict[str, Any]:
    """For each backend of an op the reasons against it, and the one that runs."""
    inputs = testing.make_inputs(name, testing.VIT_SHAPES["base"], batch, dtype, str(device))
    with use_backend("torch"), explaining() as explained, torch.no_grad():
        getattr(ops, name)(**inputs)
    reasons = explained[name]
    able = [backend for backend, against in reasons.items() if not against]
    return {"runs": able[0] if able else None, "backends": reasons}


def _tables(result: dict[str, Any]) -> list[Any]:
    facts = [(name, "-" if value is None else str(value)) for name, value in result["machine"].items()]
    compiled = [
        (name, "[green]yes[/]", _facts(part))
        if part["available"]
        else (name, "[yellow]no[/]", f"{'; '.join(part['reasons'])}\n[dim]{part['costs']}[/]")
        for name, part in result["parts"].items()
    ]
    rows = []
    for op, found in result["ops"].items():
        for i, (backend, reasons) in enumerate(found["backends"].items()):
            verdict = "; ".join(reasons) or ("[green]runs[/]" if backend == found["runs"] else "could run")
            rows.append((op if i == 0 else "", backend, verdict))
    typical = result["typical_input"]
    title = f"Ops on {typical['model']}, batch {typical['batch']}, {typical['dtype']}, {typical['device']}"
    return [
        _common.table(f"fastvit {result['fastvit']}", ("", ""), facts),
        _common.table("Compiled parts", ("part", "there", ""), compiled),
        _common.table(title, ("op", "backend", "why not"), rows),
    ]


def _facts(part: dict[str, Any]) -> str:
    """Build facts and CPU capabilities in a line; capabilities that are absent are left out."""
    known = {**part.get("build", {}), **part.get("cpu", {})}
    shown = [name if value is True else f"{name} {value}" for name, value in known.items() if value not in (False, "")]
    return ", ".join(shown)
