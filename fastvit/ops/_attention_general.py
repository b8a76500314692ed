"""The Triton attention kernels with options (mask, causal order, dropout) as ops of their own.

Plain calls do not pass here, so their schema, saved tensors and cost stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _register

NAME = "attention_general"


def run(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout_p: float, scale: float):
    """``fastvit.ops.attention`` on Triton; the seed of the dropout is the next number of PyTorch's generator."""
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    return _fwd_op(q, k, v, attn_mask, is_causal, dropout_p, seed, scale, "triton")[0]


def run_packed(qkv: Tensor, num_heads: int, dropout_p: float, scale: float) -> Tensor:
    """``fastvit.ops.attention_packed`` with dropout on Triton."""
    return _packed_fwd_op(qkv, num_heads, dropout_p, draw_seed(qkv.device), scale, "triton")[0]


def draw_seed(device: torch.device) -> Tensor:
    """On the device: no synchronisation, a new one at every replay of a CUDA graph, the same after a checkpoint."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def kernels():
    from ..kernels import attention_general as kernels  # type: ignore[attr-defined]

    return kernels


def tokens_first(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) stored as (B, N, H, D), so that the heads of a token lie side by side."""
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _fwd(q, k, v, attn_mask, is_causal, dropout_p, dropout_seed, scale, backend):
    options = kernels().Options(scale, attn_mask, is_causal, dropout_p, dropout_seed)
    return kernels().attention_general_fwd(q, k, v, options)


def _fwd_fake(q, k, v, attn_mask, is_causal, dropout_p, dropout_seed, scale, backend):
    return tokens_first(q), *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))


def _bwd(dout, q, k, v, out, top, log, attn_mask, is_causal, dropout_p, dropout_seed, scale, backend):
    dq, dk, dv = tokens_first(q), tokens_first(k), tokens_first(v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    options = kernels().Options(scale, attn_mask, is_causal, dropout_p, dropout_seed)
    kernels().attention_general_bwd(dout, q, k, v, out, top, log, options, dq, dk, dv)
    return dq, dk, dv


def _bwd_fake(dout, q, k, v, out, top, log, attn_mask, is_causal, dropout_p, dropout_seed, scale, backend):
    return tokens_first(q), tokens_first(k), tokens_first(v)


def _packed_fwd(qkv, num_heads, dropout_p, dropout_seed, scale, backend):
    q, k, v = reference.unpack_qkv(qkv, num_heads)
    out, top, log = _fwd(q, k, v, None, False, dropout_p, dropout_seed, scale, backend)
    return out.transpose(1, 2).flatten(2), top, log


def _packed_fwd_fake(qkv, num_heads, dropout_p, dropout_seed, scale, backend):
    batch, tokens, packed = qkv.shape
    statistics = (qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32) for _ in range(2))
    return qkv.new_empty(batch, tokens, packed // 3), *statistics


def _packed_bwd(dout, qkv, out, top, log, num_heads, dropout_p, dropout_seed, scale, backend):
    dqkv = qkv.new_empty(qkv.shape)
    dout, out = (tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in (dout, out))
    options = kernels().Options(scale, dropout_p=dropout_p, dropout_seed=dropout_seed)
    heads, grads = reference.unpack_qkv(qkv, num_heads), reference.unpack_qkv(dqkv, num_heads)
    kernels().attention_general_bwd(dout, *heads, out, top, log, options, *grads)
    return dqkv


def _packed_bwd_fake(dout, qkv, out, top, log, num_heads, dropout_p, dropout_seed, scale, backend):
    return qkv.new_empty(qkv.shape)


_OPTIONS = "Tensor? attn_mask, bool is_causal, float dropout_p, Tensor? dropout_seed, float scale, str backend"
_fwd_op = _register.define(
    f"{NAME}_fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor top, Tensor log, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)

_PACKED_OPTIONS = "int num_heads, float dropout_p, Tensor dropout_seed, float scale, str backend"
_packed_fwd_op = _register.define(
    f"{NAME}_packed_fwd",
    f"(Tensor qkv, {_PACKED_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _packed_fwd,
    _packed_fwd_fake,
)
_packed_bwd_op = _register.define(
    f"{NAME}_packed_bwd",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor top, Tensor log, {_PACKED_OPTIONS}) -> Tensor",
    _packed_bwd,
    _packed_bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, attn_mask, ctx.is_causal, ctx.dropout_p, dropout_seed, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, attn_mask, dropout_seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    if dout is None:
        return (None,) * 9
    *saved, attn_mask, seed = ctx.saved_tensors
    options = (attn_mask, ctx.is_causal, ctx.dropout_p, seed, ctx.scale, ctx.backend)
    return *_bwd_op(dout, *saved, *options), *(None,) * 6


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, ctx.num_heads, ctx.dropout_p, dropout_seed, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, *output, dropout_seed)
    ctx.set_materialize_grads(False)


def _packed_backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    if dout is None:
        return (None,) * 6
    *saved, seed = ctx.saved_tensors
    return _packed_bwd_op(dout, *saved, ctx.num_heads, ctx.dropout_p, seed, ctx.scale, ctx.backend), *(None,) * 5


_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_register.register_autograd(f"{NAME}_packed_fwd", _packed_setup_context, _packed_backward)
_MEANING = ("attn_mask", "is_causal", "dropout_p", "dropout_seed", "scale")
_register.register_double_backward(
    f"{NAME}_bwd",
    reference.attention,
    inputs=("q", "k", "v", *_MEANING),
    arguments=("dout", "q", "k", "v", "out", "top", "log", *_MEANING, "backend"),
)
_PACKED_MEANING = ("num_heads", "dropout_p", "dropout_seed", "scale")
_register.register_double_backward(
    f"{NAME}_packed_bwd",
    reference.attention_packed,
    inputs=("qkv", *_PACKED_MEANING),
    arguments=("dout", "qkv", "out", "top", "log", *_PACKED_MEANING, "backend"),
)
