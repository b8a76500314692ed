"""Read attention weights of a model that never stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import kind_of, why_not_skip
from .reference import unpack_qkv


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    images: Tensor,
    layers: int | Sequence[int] | None = (-1,),
    rows: str | int | Sequence[int] = "cls",
) -> dict[int, Tensor]:
    """The attention weights of some layers and queries, with the fast path on: the model runs as ever.

    model    a ViT with ``blocks`` (fastvit's or timm's, accelerated or not), in its present mode and dtype
    images   what ``model`` takes
    layers   numbers of blocks, negative from the end; None: all
    rows     queries: "cls" (the class token's), "all", or numbers of tokens, negative from the end
    returns  {layer: (B, H, R, N)}, float32 (float64 for a model in float64); each row sums to 1, before dropout

    As the model meets a chosen block, queries of the chosen rows and the keys are computed once more, and their scores
    alone: softmax over all keys needs no other row. Memory is that of the result.
    """
    blocks = _blocks(model)
    wanted = _numbers("layers", range(len(blocks)) if layers is None else layers, len(blocks), "blocks")
    for layer in wanted:
        _check_block(blocks[layer], layer)
    if rows == "cls" and getattr(model, "cls_token", None) is None:
        raise ValueError("attention_maps: rows is 'cls', but the model has no cls_token; name the rows by number")
    if isinstance(rows, str) and rows not in ("cls", "all"):
        raise ValueError(f"attention_maps: rows is {rows!r}, expected 'cls', 'all' or numbers of tokens")
    found: dict[int, Tensor] = {}

    def look(layer: int):
        def before(block: nn.Module, args: tuple) -> None:
            found[layer] = _weights(block, args[0], rows)

        return before

    handles = [blocks[layer].register_forward_pre_hook(look(layer)) for layer in wanted]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in wanted if layer not in found]
    if missing:
        raise ValueError(f"attention_maps: the model's forward did not call block {missing[0]}")
    return found


def _blocks(model: nn.Module) -> Any:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise TypeError(
            f"attention_maps: model is a {type(model).__name__} without a sequence of blocks, expected a ViT"
        )
    return blocks


def _check_block(block: Any, layer: int) -> None:
    for name, module, kind in (("", block, "Block"), (".attn", getattr(block, "attn", None), "Attention")):
        if kind_of(module) != kind:
            came = type(module).__qualname__
            raise ValueError(f"attention_maps: blocks.{layer}{name} is a {came}, expected timm's or fastvit's {kind}")


def _numbers(name: str, wanted: int | Sequence[int], size: int, of: str) -> list[int]:
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    for number in numbers:
        if not -size <= number < size:
            raise ValueError(f"attention_maps: {name} names {number}, expected a number below {size}, of its {of}")
    return [number % size for number in numbers]


def _weights(block: Any, x: Tensor, rows: str | int | Sequence[int]) -> Tensor:
    """softmax(scale * q k^T) of the chosen rows of ``x``, (B, N, E)."""
    attn, tokens = block.attn, x.shape[1]
    if rows != "all":
        rows = _numbers("rows", 0 if rows == "cls" else rows, tokens, "tokens")  # type: ignore[arg-type]
    q, k = _queries_and_keys(attn, block.norm1(x), rows)
    q, k = attn.q_norm(q), attn.k_norm(k)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return torch.softmax(q.to(wide) * attn.scale @ k.to(wide).transpose(-2, -1), dim=-1)


def _queries_and_keys(attn: Any, x: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """(B, H, R, D) and (B, H, N, D); a projection that is more than a Linear is asked for everything."""
    take = slice(None) if rows == "all" else rows
    if why_not_skip(attn.qkv, "attn.qkv", "Linear"):
        q, k, _ = unpack_qkv(attn.qkv(x), attn.num_heads)
        return q[:, :, take], k
    weights = attn.qkv.weight.chunk(3)
    biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    q, k = F.linear(x[:, take], weights[0], biases[0]), F.linear(x, weights[1], biases[1])
    q, k = (tensor.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for tensor in (q, k))
    return q, k
