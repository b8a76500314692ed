"""What a plan is, and the four calls that it stands in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..block_parts import BlockParts


class Later(Exception):
    """The ops have not run such a call yet, from which the plan takes what they found out."""


class Plan(NamedTuple):
    run: Callable[..., Tensor | None]
    arguments: tuple[Any, ...]
    """Of ``run``, behind x and the parameters."""
    backends: dict[str, Any]
    """Op by op, those that it stands in for."""
    launch: Any = None
    """The attention's, made before; kept, so that its binary stays loaded."""

    def is_outdated(self) -> bool:
        """Whether a backend was replaced since, or somebody wants to hear of launches."""
        replaced = any(dispatch.OPS[op].backends.get(kept.name) is not kept for op, kept in self.backends.items())
        return replaced or (self.launch is not None and self.launch.is_watched())


def parameters(parts: BlockParts) -> tuple[Tensor | None, ...]:
    return *parts.norm1, *parts.qkv, *parts.proj, parts.gamma1, *parts.mlp, parts.gamma2


def backends_of(names: tuple[str, str], class_token: bool) -> dict[str, Any]:
    """Op by op; ``names`` are the attention's backend and the others'."""
    attention = "attention" if class_token else "attention_packed"
    ops = ("layernorm_linear", attention, "linear_residual", "layernorm_mlp")
    return {op: dispatch.OPS[op].backends.get(names[0] if op == attention else names[1]) for op in ops}


def class_token_linears(x: Tensor, norm: tuple[Any, Any], linear: tuple[Any, Any]) -> tuple[tuple, tuple]:
    """Arguments of layernorm_linear for q of token 0, and for k and v of all."""
    weight, bias = linear
    width = weight.shape[0] // 3
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    return (x[:, :1], *norm, weight[:width], q_bias), (x, *norm, weight[width:], kv_bias)


def class_token_heads(q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, 1, H * D) and kv (B, N, 2 * H * D) as q (B, H, 1, D), k and v (B, H, N, D)."""
    k, v = torch.unflatten(kv, -1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return torch.unflatten(q, -1, (num_heads, -1)).transpose(1, 2), k, v


def empty_heads(parts: BlockParts, x: Tensor, class_token: bool) -> tuple[Tensor, ...]:
    """Laid out as what the attention is given: a packed projection, or the class token's q, and k and v of all."""
    weight, (batch, tokens, _) = parts.qkv[0], x.shape
    width = weight.shape[0] // 3
    if not class_token:
        return (weight.new_empty(batch, tokens, 3 * width),)
    return class_token_heads(
        weight.new_empty(batch, 1, width), weight.new_empty(batch, tokens, 2 * width), parts.heads[0]
    )


def op_calls(parts: BlockParts, x: Tensor, memory: str, class_token: bool) -> list[tuple[str, tuple]]:
    """The ops with arguments such as a block without a plan gives them."""
    heads, (num_heads, _, scale) = empty_heads(parts, x, class_token), parts.heads
    calls: list[tuple[str, tuple]] = []
    if class_token:
        for linear in class_token_linears(x, parts.norm1, parts.qkv):
            calls.append(("layernorm_linear", (*linear, parts.eps1, False)))
        calls.append(("attention", (*heads, None, False, 0.0, scale, None, None, None)))
    else:
        calls.append(("layernorm_linear", (x, *parts.norm1, *parts.qkv, parts.eps1, True)))
        calls.append(("attention_packed", (*heads, num_heads, 0.0, scale, None, None, None)))
    residual = x[:, :1] if class_token else x
    attended = heads[0].new_empty(*residual.shape[:2], parts.qkv[0].shape[0] // 3)
    calls.append(("linear_residual", (attended, *parts.proj, residual, parts.gamma1, None)))
    mlp = (residual.detach(), *parts.mlp, parts.gamma2, None, parts.act, parts.eps2, True, memory)
    return [*calls, ("layernorm_mlp", mlp)]
