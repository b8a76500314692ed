"""Weights from other formats under timm's keys: JAX ``.npz`` files and an ONNX encoder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model. The model is left as it was."""


def read_npz(path: str | os.PathLike, prefix: str = "") -> dict[str, Tensor]:
    """A ViT in JAX's ``.npz`` layout (the original and the big_vision one) under timm's keys.

    prefix  what stands before ``embedding/kernel`` in the file; found by itself when empty
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(np.array(file[name], dtype=np.float32)) for name in file.files}
    except Exception as error:
        raise CheckpointError(f"{path}: is no readable .npz file of plain arrays ({error})") from error
    known = (prefix,) if prefix else ("", "opt/target/", "params/", "params/img/")
    found = [start for start in known if f"{start}embedding/kernel" in arrays]
    if not found:
        raise CheckpointError(f"{path}: has no array {' or '.join(f'{start}embedding/kernel' for start in known)}")
    arrays = {name[len(found[0]) :]: array for name, array in arrays.items() if name.startswith(found[0])}
    try:
        return _from_jax(arrays)
    except KeyError as error:
        raise CheckpointError(f"{path}: has no array {found[0]}{error.args[0]}") from error


def _from_jax(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {
        "patch_embed.proj.weight": arrays["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"],
    }
    if "cls" in arrays:
        state["cls_token"] = arrays["cls"]
    classic = "Transformer/posembed_input/pos_embedding"
    state["pos_embed"] = arrays[classic if classic in arrays else "pos_embedding"]
    _norm(state, "norm.", arrays, "Transformer/encoder_norm/")
    if "head/kernel" in arrays:
        _dense(state, "head.", arrays, "head/")
    # big_vision numbers the parts of a block anew, and may stack all blocks along a first dimension.
    stacked = "Transformer/encoderblock/LayerNorm_0/scale" in arrays
    names = ("MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_1")
    if "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel" in arrays:
        names = ("MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_2")
    for i in range(_depth(arrays, stacked)):
        start = "Transformer/encoderblock/" if stacked else f"Transformer/encoderblock_{i}/"
        part = {n[len(start) :]: (a[i] if stacked else a) for n, a in arrays.items() if n.startswith(start)}
        _block(state, f"blocks.{i}.", part, *names)
    if "MAPHead_0/probe" in arrays:
        _map_head(state, {n[len("MAPHead_0/") :]: a for n, a in arrays.items() if n.startswith("MAPHead_0/")})
    return {key: tensor.contiguous() for key, tensor in state.items()}


def _depth(arrays: dict[str, Tensor], stacked: bool) -> int:
    if stacked:
        return arrays["Transformer/encoderblock/LayerNorm_0/scale"].shape[0]
    numbers = [re.match(r"Transformer/encoderblock_(\d+)/", name) for name in arrays]
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _norm(state: dict[str, Tensor], key: str, arrays: dict[str, Tensor], name: str) -> None:
    state[f"{key}weight"] = arrays[f"{name}scale"]
    state[f"{key}bias"] = arrays[f"{name}bias"]


def _dense(state: dict[str, Tensor], key: str, arrays: dict[str, Tensor], name: str) -> None:
    state[f"{key}weight"] = arrays[f"{name}kernel"].t()
    state[f"{key}bias"] = arrays[f"{name}bias"]


def _heads(state: dict[str, Tensor], key: str, arrays: dict[str, Tensor], name: str, parts: tuple[str, ...]) -> None:
    """Projections to heads, kernels (E, H, D), as one packed linear layer."""
    state[f"{key}weight"] = torch.cat([arrays[f"{name}{part}/kernel"].flatten(1).t() for part in parts])
    state[f"{key}bias"] = torch.cat([arrays[f"{name}{part}/bias"].flatten() for part in parts])


def _block(state: dict[str, Tensor], key: str, part: dict[str, Tensor], attention: str, mlp: str, norm2: str) -> None:
    _norm(state, f"{key}norm1.", part, "LayerNorm_0/")
    _heads(state, f"{key}attn.qkv.", part, f"{attention}/", ("query", "key", "value"))
    state[f"{key}attn.proj.weight"] = part[f"{attention}/out/kernel"].flatten(0, 1).t()
    state[f"{key}attn.proj.bias"] = part[f"{attention}/out/bias"]
    _norm(state, f"{key}norm2.", part, f"{norm2}/")
    for i in (0, 1):
        _dense(state, f"{key}mlp.fc{i + 1}.", part, f"{mlp}/Dense_{i}/")


def _map_head(state: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    attention = "MultiHeadDotProductAttention_0/"
    state["attn_pool.latent"] = part["probe"]
    _heads(state, "attn_pool.q.", part, attention, ("query",))
    _heads(state, "attn_pool.kv.", part, attention, ("key", "value"))
    state["attn_pool.proj.weight"] = part[f"{attention}out/kernel"].flatten(0, 1).t()
    state["attn_pool.proj.bias"] = part[f"{attention}out/bias"]
    _norm(state, "attn_pool.norm.", part, "LayerNorm_0/")
    for i in (0, 1):
        _dense(state, f"attn_pool.mlp.fc{i + 1}.", part, f"MlpBlock_0/Dense_{i}/")


# Module paths of an exported DINOv2 encoder, and their names in timm. {} is the block's number.
_ONNX_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
_ONNX_ROOT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_ENCODER = "backbone."


def read_onnx_encoder(path: str | os.PathLike) -> dict[str, Tensor]:
    """The DINOv2-style encoder (initialisers under ``backbone.``) of an ONNX graph under timm's keys.

    Every initialiser that an encoder node reads is used exactly once; any that is not understood is an error.
    """
    weights = _encoder_weights(path)
    state: dict[str, Tensor] = {}
    for name, key in _ONNX_ROOT.items():
        state[key] = _take(path, weights, name)
    table = [_take(path, weights, f"embeddings.position_embeddings.{part}") for part in ("class", "patches")]
    state["pos_embed"] = torch.cat(table, dim=1)
    blocks = sorted({int(number[1]) for number in map(re.compile(r"encoder\.layer\.(\d+)\.").match, weights) if number})
    for i in blocks:
        start = f"encoder.layer.{i}."
        for name, key in _ONNX_BLOCK.items():
            state[f"blocks.{i}.{key}"] = _take(path, weights, start + name)
        for kind in ("weight", "bias"):
            parts = [_take(path, weights, f"{start}attention.attention.{n}.{kind}") for n in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    if weights:
        raise CheckpointError(f"{path}: the encoder has weights that are not understood: {some_of(weights)}")
    return {key: tensor.contiguous() for key, tensor in state.items()}


def _take(path: Any, weights: dict[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise CheckpointError(f"{path}: the encoder has no weight {_ENCODER}{name}")
    return weights.pop(name)


def _encoder_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every initialiser that a node of the encoder reads, by module path; matrices as nn.Linear stores them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        message = "reading an .onnx file needs the package onnx: pip install 'fastvit[convert]'"
        raise ImportError(message, name="onnx") from error
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        graph = onnx.load(os.fspath(path)).graph
    except Exception as error:
        raise CheckpointError(f"{path}: is no readable ONNX file ({error})") from error
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, Tensor] = {}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        for index, name in enumerate(node.input):
            if name in arrays:
                tensor = torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())
                target, tensor = _module_path(name, node, index, tensor)
                if target in weights and not torch.equal(weights[target], tensor):
                    raise CheckpointError(f"{path}: two different initialisers stand for {_ENCODER}{target}")
                weights[target] = tensor
    if not weights:
        raise CheckpointError(f"{path}: has no encoder, expected nodes named /backbone/...")
    return weights


def _module_path(name: str, node: Any, index: int, tensor: Tensor) -> tuple[str, Tensor]:
    """Which parameter an initialiser is: by its name, or by the node that reads it where the exporter renamed it."""
    if name.startswith(_ENCODER):
        return name[len(_ENCODER) :], tensor
    module, _, _ = node.name[len("/backbone/") :].rpartition("/")
    if node.op_type == "MatMul" and index == 1:
        return f"{module.replace('/', '.')}.weight", tensor.t()
    if module == "embeddings" and node.op_type in ("Concat", "Reshape") and tensor.dim() == 3:
        return f"embeddings.position_embeddings.{'class' if node.op_type == 'Concat' else 'patches'}", tensor
    return f"{node.name} input {index} ({name})", tensor


def some_of(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
