"""Convert a ViT's checkpoint (ONNX encoder, JAX .npz, .pth, .bin, .safetensors) to safetensors with timm's keys.

Strict: with --model every key and shape is checked against that model before anything is written. Nothing that could
run code is unpickled.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from . import _common

ANY_VIT = "patch_embed.proj.weight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="the checkpoint to read")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", help="the variant it must fit (default for .onnx: vit_small_patch14_dinov2)")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    _common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    source, target = args.source, args.target
    if target.suffix != ".safetensors":
        raise _common.Failure(f"{target}: the target's name has to end in .safetensors")
    if target.exists() and not args.force:
        raise _common.Failure(f"{target} exists; --force replaces it")
    with _common.wrong_inputs():
        state = _convert(source, target, args.model)
    result = {
        "source": str(source),
        "target": str(target),
        "model": args.model,
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
    }
    line = f"{source} -> {target}: {result['tensors']} tensors, {result['parameters']:,} parameters"
    _common.report(args, result, [line] if args.json != "-" else ())
    return _common.FINE


def _convert(source: Path, target: Path, model: str | None) -> dict[str, Tensor]:
    from ..checkpoints import check_fit, convert_onnx, read_state_dict, save_checkpoint
    from ..model import create_model

    if source.suffix.lower() == ".onnx":
        try:
            return convert_onnx(source, target, model or "vit_small_patch14_dinov2")
        except ImportError as error:
            raise _common.Failure(str(error), _common.MISSING) from error
    state = read_state_dict(source)
    if model is not None:
        with torch.device("meta"):
            wanted = create_model(model, num_classes=head_size(state)).state_dict()
        check_fit(state, wanted, str(source), strict=True)
    elif ANY_VIT not in state:
        raise _common.Failure(f"{source}: has no {ANY_VIT}, so its keys are not timm's")
    save_checkpoint(state, target)
    return state


def head_size(state: dict[str, Tensor]) -> int:
    """The number of classes of a checkpoint under timm's keys; 0 without a classifier."""
    return state["head.weight"].shape[0] if "head.weight" in state else 0
