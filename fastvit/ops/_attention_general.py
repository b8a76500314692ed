"""The attention kernels with options as ops of their own: Triton's with any, C++ with norms, rotation and dropout.

Plain calls do not pass here, so their schema, saved tensors and cost stay what they are. The C++ core saves two numbers
a row where Triton has the parts of the log-sum-exp: what the scores are shifted by, and the reciprocal of the sum of
their exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import HeadNorm, Rope
from . import _contract, _heads, _register
from .layernorm_linear import keep

NAME = "attention_general"


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
    backend: str = "triton",
) -> Tensor:
    """``fastvit.ops.attention``; the seed of the dropout is the next number of PyTorch's generator."""
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    flat = _heads.flat(q_norm, k_norm, rope)
    return _fwd_op(q, k, v, *flat, attn_mask, is_causal, dropout_p, seed, scale, backend)[0]


def run_packed(
    qkv: Tensor,
    num_heads: int,
    dropout_p: float,
    scale: float,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
    backend: str = "triton",
) -> Tensor:
    """``fastvit.ops.attention_packed`` with options."""
    seed = draw_seed(qkv.device) if dropout_p > 0.0 else None
    return _packed_fwd_op(qkv, *_heads.flat(q_norm, k_norm, rope), num_heads, dropout_p, seed, scale, backend)[0]


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


def setup_context(ctx: Any, inputs: tuple, output: tuple, of_rows: int) -> None:
    """Save the leading ``of_rows`` inputs, the results, and all that follows as it came."""
    ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs[of_rows:]]
    ctx.places = [place for place, value in enumerate(inputs[of_rows:]) if isinstance(value, Tensor)]
    ctx.save_for_backward(*inputs[:of_rows], *output, *(inputs[of_rows + place] for place in ctx.places))
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dout: Tensor | None, op: Any, of_rows: int) -> tuple:
    """Gradients of the rows and of the norms' weights, which follow them; None for the rest."""
    count = len(ctx.rest)
    if dout is None:
        return (None,) * (of_rows + count)
    saved, rest = list(ctx.saved_tensors), list(ctx.rest)
    for place in reversed(ctx.places):
        rest[place] = saved.pop()
    grads = op(dout, *saved, *rest)
    wanted = list(ctx.needs_input_grad[: len(grads)])
    return *keep(wanted, grads), *(None,) * (of_rows + count - len(grads))


def meaning(fn: Any) -> Any:
    """``fn`` of fastvit.reference with the flat arguments of a schema."""

    def call(**values: Any) -> Tensor:
        heads = _heads.unflat({name: values.pop(name) for name in _heads.NAMES})
        return fn(**values, **heads)

    return call


def _options(flat, scale, attn_mask=None, is_causal=False, dropout_p=0.0, dropout_seed=None):
    preparation = kernels().Preparation(*flat)
    return kernels().Options(scale, attn_mask, is_causal, dropout_p, dropout_seed, preparation=preparation)


def cpp():
    return _contract.compiled("cpp")


def _fwd(q, k, v, *rest):
    *flat, attn_mask, is_causal, dropout_p, dropout_seed, scale, backend = rest
    if backend == "cpp":
        return cpp().attention_general_fwd(q, k, v, *flat, attn_mask, is_causal, dropout_p, dropout_seed, scale, None)
    options = _options(flat, scale, attn_mask, is_causal, dropout_p, dropout_seed)
    return kernels().attention_general_fwd(q, k, v, options)


def _fwd_fake(q, k, v, *rest):
    return tokens_first(q), *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))


def _bwd(dout, q, k, v, out, top, log, *rest):
    grads = tokens_first(q), tokens_first(k), tokens_first(v)
    return *grads, *_launch_bwd(dout, q, k, v, out, top, log, *rest, grads=grads)


def _launch_bwd(dout, q, k, v, out, top, log, *rest, grads):
    """Write dq, dk, dv; return the gradients of the norms' weights."""
    *flat, attn_mask, is_causal, dropout_p, dropout_seed, scale, backend = rest
    if backend == "cpp":
        options = (*flat, attn_mask, is_causal, dropout_p, dropout_seed, scale, None)
        sums = cpp().attention_general_bwd(dout, q, k, v, out, top, log, *options, *grads)
        return _heads.weight_gradients(sums, flat[:4])
    if q.numel() == 0:
        grads[1].zero_(), grads[2].zero_()
    options = _options(flat, scale, attn_mask, is_causal, dropout_p, dropout_seed)
    sums = kernels().attention_general_bwd(dout, q, k, v, out, top, log, options, *grads)
    return _heads.weight_gradients(sums, flat[:4])


def _bwd_fake(dout, q, k, v, out, top, log, *rest):
    return tokens_first(q), tokens_first(k), tokens_first(v), *_heads.fake_weight_gradients(top, rest[:4])


def _packed_fwd(qkv, *rest):
    *flat, num_heads, dropout_p, dropout_seed, scale, backend = rest
    heads = reference.unpack_qkv(qkv, num_heads)
    out, top, log = _fwd(*heads, *flat, None, False, dropout_p, dropout_seed, scale, backend)
    return out.transpose(1, 2).flatten(2), top, log


def _packed_fwd_fake(qkv, *rest):
    (batch, tokens, packed), num_heads = qkv.shape, rest[len(_heads.NAMES)]
    statistics = (qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32) for _ in range(2))
    return qkv.new_empty(batch, tokens, packed // 3), *statistics


def _packed_bwd(dout, qkv, out, top, log, *rest):
    *flat, num_heads, dropout_p, dropout_seed, scale, backend = rest
    dqkv = qkv.new_empty(qkv.shape)
    dout, out = (tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in (dout, out))
    heads, grads = reference.unpack_qkv(qkv, num_heads), reference.unpack_qkv(dqkv, num_heads)
    options = (*flat, None, False, dropout_p, dropout_seed, scale, backend)
    return dqkv, *_launch_bwd(dout, *heads, out, top, log, *options, grads=grads)


def _packed_bwd_fake(dout, qkv, out, top, log, *rest):
    return qkv.new_empty(qkv.shape), *_heads.fake_weight_gradients(top, rest[:4])


_FOUR = "Tensor, Tensor, Tensor, Tensor"
_OPTIONS = (
    f"{_heads.SCHEMA}, Tensor? attn_mask, bool is_causal, float dropout_p, Tensor? dropout_seed, float scale,"
    " str backend"
)
_fwd_op = _register.define(
    f"{NAME}_fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor top, Tensor log, {_OPTIONS})"
    f" -> (Tensor, Tensor, Tensor, {_FOUR})",
    _bwd,
    _bwd_fake,
)

_PACKED_OPTIONS = f"{_heads.SCHEMA}, int num_heads, float dropout_p, Tensor? dropout_seed, float scale, str backend"
_packed_fwd_op = _register.define(
    f"{NAME}_packed_fwd",
    f"(Tensor qkv, {_PACKED_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _packed_fwd,
    _packed_fwd_fake,
)
_packed_bwd_op = _register.define(
    f"{NAME}_packed_bwd",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor top, Tensor log, {_PACKED_OPTIONS}) -> (Tensor, {_FOUR})",
    _packed_bwd,
    _packed_bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    setup_context(ctx, inputs, output, of_rows=3)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    return backward(ctx, dout, _bwd_op, of_rows=3)


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    setup_context(ctx, inputs, output, of_rows=1)


def _packed_backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    return backward(ctx, dout, _packed_bwd_op, of_rows=1)


_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_register.register_autograd(f"{NAME}_packed_fwd", _packed_setup_context, _packed_backward)
_MEANING = (*_heads.NAMES, "attn_mask", "is_causal", "dropout_p", "dropout_seed", "scale")
_register.register_double_backward(
    f"{NAME}_bwd",
    meaning(reference.attention),
    inputs=("q", "k", "v", *_MEANING),
    arguments=("dout", "q", "k", "v", "out", "top", "log", *_MEANING, "backend"),
)
_PACKED_MEANING = (*_heads.NAMES, "num_heads", "dropout_p", "dropout_seed", "scale")
_register.register_double_backward(
    f"{NAME}_packed_bwd",
    meaning(reference.attention_packed),
    inputs=("qkv", *_PACKED_MEANING),
    arguments=("dout", "qkv", "out", "top", "log", *_PACKED_MEANING, "backend"),
)
