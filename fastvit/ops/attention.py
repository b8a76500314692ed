"""Multi-head attention, on separate q, k, v or in place on a packed projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension, reference
from ..dispatch import Backend, Op
from ..reference import HeadNorm, Rope
from . import _attention_general, _contract, _heads, _register, _sm90

NAME, PACKED = "attention", "attention_packed"
HEAD_DIMS = range(32, 129, 8)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """``softmax(q k^T * scale + mask) v``, the meaning of F.scaled_dot_product_attention.

    q          (B, H, Nq, D)  float32 | bfloat16 | float16, any strides, one device
    k, v       (B, H, Nk, D)  dtype of q
    attn_mask  broadcastable to (B, H, Nq, Nk): bool (True takes part) or float (added), e.g. (B, 1, 1, Nk) for the
               padding of keys; read by its strides, never expanded
    is_causal  query m attends to keys 0 to m
    dropout_p  probability of dropping a weight; leave at 0 outside training. Seeded by PyTorch's generator
    scale      default D ** -0.5
    q_norm     LayerNorm or RMSNorm of q over D, and k_norm of k: applied as the kernel loads them, in float32
    rope       rotates q and k, once normalised, by their positions; its table takes no gradient in the kernel
    returns    (B, H, Nq, D)  dtype of q, stored as (B, Nq, H, D); softmax and sums in float32. A query whose every
               key is masked gets zeros

    Raises ValueError for a wrong shape, dtype or device, Unsupported where a forced backend cannot run.
    Meaning: fastvit.reference.attention.
    """
    scale = q.shape[-1] ** -0.5 if scale is None and q.dim() else scale
    options = (attn_mask, is_causal, dropout_p, scale, q_norm, k_norm, rope)
    return _contract.call(ATTENTION, _check, (0, 1, 2), q, k, v, *options)


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Self-attention read in place from a packed projection; its gradient is written packed too.

    qkv      (B, N, 3 * H * D)  ordered q, k, v, then head, then head dim
    returns  (B, N, H * D)      dtype of qkv

    Otherwise as ``attention``. Meaning: fastvit.reference.attention_packed.
    """
    if scale is None and qkv.dim() and num_heads >= 1 and qkv.shape[-1]:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    return _contract.call(ATTENTION_PACKED, _check_packed, (0,), qkv, num_heads, dropout_p, scale, q_norm, k_norm, rope)


def _check(q, k, v, attn_mask, is_causal, dropout_p, scale, q_norm, k_norm, rope) -> None:
    if q.dim() != 4:
        raise ValueError(f"{NAME}: q has shape {tuple(q.shape)}, expected (B, H, N, D)")
    _contract.check_together(NAME, "q", q, k=k, v=v)
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        expected = f"({q.shape[0]}, {q.shape[1]}, Nk, {q.shape[3]})"
        raise ValueError(f"{NAME}: k has shape {tuple(k.shape)}, expected {expected} like q")
    _contract.check_shape(NAME, "v", v, tuple(k.shape), "like k")
    if _contract.autocast_dtype(q) is None:
        _contract.check_dtype(NAME, "k", k, (q.dtype,), "like q")
        _contract.check_dtype(NAME, "v", v, (q.dtype,), "like q")
    _check_tokens_and_dropout(NAME, k.shape[2], "k", k, dropout_p)
    if attn_mask is not None:
        _check_mask(attn_mask, q, k)
    _heads.check(NAME, q, (q.shape[2], k.shape[2]), q_norm, k_norm, rope)


def _check_mask(attn_mask: Tensor, q: Tensor, k: Tensor) -> None:
    expected = (*q.shape[:3], k.shape[2])
    padded = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, expected, strict=True)):
        raise ValueError(
            f"{NAME}: attn_mask has shape {tuple(attn_mask.shape)}, expected one broadcastable to {expected}"
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"{NAME}: attn_mask is {attn_mask.dtype}, expected bool or a floating point dtype")
    if attn_mask.device != q.device:
        raise ValueError(f"{NAME}: attn_mask is on {attn_mask.device}, expected {q.device} like q")


def _check_tokens_and_dropout(op: str, tokens: int, name: str, tensor: Tensor, dropout_p: float) -> None:
    if tokens == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected at least one token")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability in [0, 1)")


def _check_packed(qkv, num_heads, dropout_p, scale, q_norm, k_norm, rope) -> None:
    if qkv.dim() != 3:
        raise ValueError(f"{PACKED}: qkv has shape {tuple(qkv.shape)}, expected (B, N, 3 * H * D)")
    if num_heads < 1 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{PACKED}: qkv has shape {tuple(qkv.shape)}, expected a last dim that 3 * {num_heads} heads divide"
        )
    _contract.check_together(PACKED, "qkv", qkv)
    _check_tokens_and_dropout(PACKED, qkv.shape[1], "qkv", qkv, dropout_p)
    if q_norm is not None or k_norm is not None or rope is not None:
        q, k, _ = reference.unpack_qkv(qkv, num_heads)
        _heads.check(PACKED, q, (q.shape[2], k.shape[2]), q_norm, k_norm, rope)


def _launch_fwd(backend, q, k, v, attn_mask, is_causal, scale):
    if backend == "cpp":
        return _contract.compiled(backend).attention_fwd(q, k, v, attn_mask, is_causal, scale)
    if backend == "cuda":
        out, lse = _hopper().attention_fwd(*map(_sm90.for_tma, (q, k, v)), scale)
        return out.transpose(1, 2), lse
    return _kernels(q)[0](q, k, v, scale)


def write_gradients(backend, dout, q, k, v, attn_mask, is_causal, out, lse, scale, dq, dk, dv) -> None:
    """Into dq, dk and dv, at any strides but of the last dim."""
    if backend == "cpp":
        cpp = _contract.compiled(backend)
        cpp.attention_bwd(dout, q, k, v, attn_mask, is_causal, out, lse, scale, dq, dk, dv)
        return
    if backend == "cuda" and _sm90.has_attention_bwd(q, k.shape[2], _hopper()):
        _hopper().attention_bwd(dq, dk, dv, *map(_sm90.for_tma, (dout, q, k, v, out)), lse, scale)
        return
    _kernels(q)[1](dout, q, k, v, out, lse, scale, dq, dk, dv)


def _kernels(q: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Triton's forward and backward for this number of queries."""
    many, few = _triton()
    if q.shape[2] <= few.MOST_QUERIES:
        return few.attention_few_fwd, few.attention_few_bwd
    return many.attention_fwd, many.attention_bwd


def _hopper() -> Any:
    """csrc/cuda/sm90/attention.cpp. What it saves is what Triton's backward reads, where it has none."""
    return torch.ops.fastvit_cuda


@cache
def _triton() -> tuple[ModuleType, ModuleType]:
    """The kernels for many queries, and for few."""
    from ..kernels import attention, attention_few  # type: ignore[attr-defined]

    return attention, attention_few


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """The kernels read vectors along the last dim; every other stride is free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tokens_first(q: Tensor) -> Tensor:
    """An empty (B, H, N, D) stored as (B, N, H, D), so that the heads of a token lie side by side."""
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _statistics(rows: tuple[int, ...], like: Tensor, backend: str) -> Tensor:
    """What the backward needs to know of (B, H, Nq) softmax rows: log-sum-exp, or in C++ and float32 two numbers."""
    two = backend == "cpp" or like.dtype == torch.float32
    return like.new_empty((2, *rows) if two else rows, dtype=torch.float32)


def _fwd(q, k, v, attn_mask, is_causal, scale, backend):
    if q.numel() == 0:
        return _tokens_first(q), _statistics(q.shape[:3], q, backend)
    q, k, v = map(_rows_contiguous, (q, k, v))
    return _launch_fwd(backend, q, k, v, attn_mask, is_causal, scale)


def _fwd_fake(q, k, v, attn_mask, is_causal, scale, backend):
    return _tokens_first(q), _statistics(q.shape[:3], q, backend)


def _bwd(dout, q, k, v, attn_mask, is_causal, out, lse, scale, backend):
    dq, dk, dv = _tokens_first(q), _tokens_first(k), _tokens_first(v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    q, k, v, dout = map(_rows_contiguous, (q, k, v, dout))
    write_gradients(backend, dout, q, k, v, attn_mask, is_causal, out, lse, scale, dq, dk, dv)
    return dq, dk, dv


def _bwd_fake(dout, q, k, v, attn_mask, is_causal, out, lse, scale, backend):
    return _tokens_first(q), _tokens_first(k), _tokens_first(v)


def as_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) seen as (B, H, N, D)."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _packed_fwd(qkv, num_heads, scale, backend):
    if backend == "triton":
        many, few = _triton()
        if qkv.shape[1] > few.MOST_QUERIES and many.reads_packed(qkv):
            return many.attention_packed_fwd(qkv, num_heads, scale)
    if backend == "cuda" and qkv.numel():
        return _hopper().attention_packed_fwd(_sm90.for_tma(qkv), num_heads, scale)
    q, k, v = reference.unpack_qkv(_rows_contiguous(qkv), num_heads)
    out, lse = _fwd(q, k, v, None, False, scale, backend)
    return out.transpose(1, 2).flatten(2), lse


def _packed_fwd_fake(qkv, num_heads, scale, backend):
    batch, tokens, packed = qkv.shape
    return qkv.new_empty(batch, tokens, packed // 3), _statistics((batch, num_heads, tokens), qkv, backend)


def _packed_bwd(dout, qkv, out, lse, num_heads, scale, backend):
    dqkv = qkv.new_empty(qkv.shape)
    if qkv.numel() == 0:
        return dqkv
    q, k, v = reference.unpack_qkv(_rows_contiguous(qkv), num_heads)
    dq, dk, dv = reference.unpack_qkv(dqkv, num_heads)
    dout, out = as_heads(_rows_contiguous(dout), num_heads), as_heads(out, num_heads)
    write_gradients(backend, dout, q, k, v, None, False, out, lse, scale, dq, dk, dv)
    return dqkv


def _packed_bwd_fake(dout, qkv, out, lse, num_heads, scale, backend):
    return qkv.new_empty(qkv.shape)


_fwd_op = _register.define(
    f"{NAME}_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float scale, str backend) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, Tensor out, Tensor lse,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
_packed_fwd_op = _register.define(
    f"{PACKED}_fwd",
    "(Tensor qkv, int num_heads, float scale, str backend) -> (Tensor, Tensor)",
    _packed_fwd,
    _packed_fwd_fake,
)
_packed_bwd_op = _register.define(
    f"{PACKED}_bwd",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale, str backend) -> Tensor",
    _packed_bwd,
    _packed_bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, attn_mask, ctx.is_causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, attn_mask, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple:
    if dout is None:
        return (None,) * 7
    q, k, v, attn_mask, out, lse = ctx.saved_tensors
    grads = _bwd_op(dout, q, k, v, attn_mask, ctx.is_causal, out, lse, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


def _packed_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, ctx.num_heads, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def _packed_backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple:
    if dout is None:
        return (None,) * 4
    return _packed_bwd_op(dout, *ctx.saved_tensors, ctx.num_heads, ctx.scale, ctx.backend), None, None, None


_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_register.register_double_backward(
    f"{NAME}_bwd",
    reference.attention,
    inputs=("q", "k", "v", "attn_mask", "is_causal", "scale"),
    arguments=("dout", "q", "k", "v", "attn_mask", "is_causal", "out", "lse", "scale", "backend"),
)
_register.register_autograd(f"{PACKED}_fwd", _packed_setup_context, _packed_backward)
_register.register_double_backward(
    f"{PACKED}_bwd",
    reference.attention_packed,
    inputs=("qkv", "num_heads", "scale"),
    arguments=("dout", "qkv", "out", "lse", "num_heads", "scale", "backend"),
)


def _why_not_triton(q, k, v, attn_mask, is_causal, dropout_p, scale, q_norm=None, k_norm=None, rope=None):
    reasons = _contract.why_not_triton("q", q)
    if q.shape[-1] not in HEAD_DIMS:
        reasons.append(f"the head dim is {q.shape[-1]}, triton takes 32 to 128 in steps of 8")
    if attn_mask is not None and attn_mask.requires_grad:
        reasons.append("attn_mask requires a gradient, triton gives none")
    if not scale > 0:
        reasons.append(f"scale is {scale}, triton takes one above 0")
    return reasons + _heads.why_not_triton(q_norm, k_norm, rope)


def _why_not_triton_packed(qkv, num_heads, dropout_p, scale, q_norm=None, k_norm=None, rope=None):
    q, k, v = reference.unpack_qkv(qkv, num_heads)
    return _why_not_triton(q, k, v, None, False, dropout_p, scale, q_norm, k_norm, rope)


def _run_triton(q, k, v, attn_mask, is_causal, dropout_p, scale, q_norm=None, k_norm=None, rope=None):
    if attn_mask is not None or is_causal or dropout_p > 0.0 or q_norm is not None or rope is not None:
        return _attention_general.run(q, k, v, attn_mask, is_causal, dropout_p, scale, q_norm, k_norm, rope)
    return _fwd_op(q, k, v, None, False, scale, "triton")[0]


def _run_triton_packed(qkv, num_heads, dropout_p, scale, q_norm=None, k_norm=None, rope=None):
    if dropout_p > 0.0 or q_norm is not None or rope is not None:
        return _attention_general.run_packed(qkv, num_heads, dropout_p, scale, q_norm, k_norm, rope)
    return _packed_fwd_op(qkv, num_heads, scale, "triton")[0]


def _why_not_cuda(q, k, v, attn_mask, is_causal, dropout_p, scale, *heads):
    reasons = _contract.why_not_compiled("cuda", q, q, "q")
    if not reasons:
        reasons += _sm90.why_not_attention(q, k.shape[2])
    if attn_mask is not None or is_causal or dropout_p > 0.0 or any(part is not None for part in heads):
        reasons.append("Hopper's attention has no masks, causal order, dropout, norms or rotation")
    if not scale > 0:
        reasons.append(f"scale is {scale}, Hopper's attention takes one above 0")
    if any(t.requires_grad for t in (q, k, v)) and not _sm90.has_attention_bwd(q, k.shape[2], _hopper()):
        reasons += [f"the gradient is triton's: {reason}" for reason in _extension.why_not_triton()]
    return reasons


def _why_not_cuda_packed(qkv, num_heads, dropout_p, scale, *heads):
    q, k, v = reference.unpack_qkv(qkv, num_heads)
    return _why_not_cuda(q, k, v, None, False, dropout_p, scale, *heads)


def _run_cuda(q, k, v, attn_mask, is_causal, dropout_p, scale, *heads):
    return _fwd_op(q, k, v, None, False, scale, "cuda")[0]


def _run_cuda_packed(qkv, num_heads, dropout_p, scale, *heads):
    return _packed_fwd_op(qkv, num_heads, scale, "cuda")[0]


def _why_not_cpp(q, k, v, attn_mask, is_causal, dropout_p, scale, *heads, name="q"):
    reasons = _contract.why_not_compiled("cpp", q, q, name)
    if attn_mask is not None and attn_mask.requires_grad:
        reasons.append("attn_mask requires a gradient, cpp gives none")
    return reasons


def _why_not_cpp_packed(qkv, num_heads, dropout_p, scale, *heads):
    return _why_not_cpp(qkv, None, None, None, False, dropout_p, scale, name="qkv")


def _prepared(q, k, q_norm=None, k_norm=None, rope=None):
    """Norms and rotation by stock PyTorch, before a core that has none."""
    return reference.prepare_heads(q, q_norm, rope), reference.prepare_heads(k, k_norm, rope)


def _run_cpp(q, k, v, attn_mask, is_causal, dropout_p, scale, q_norm=None, k_norm=None, rope=None):
    if not _heads.fits(q_norm, k_norm, rope):
        q, k = _prepared(q, k, q_norm, k_norm, rope)
        q_norm = k_norm = rope = None
    if dropout_p > 0.0 or q_norm is not None or rope is not None:
        heads = (q_norm, k_norm, rope)
        return _attention_general.run(q, k, v, attn_mask, is_causal, dropout_p, scale, *heads, "cpp")
    return _fwd_op(q, k, v, attn_mask, is_causal, scale, "cpp")[0]


def _run_cpp_packed(qkv, num_heads, dropout_p, scale, q_norm=None, k_norm=None, rope=None):
    heads = (q_norm, k_norm, rope)
    if not _heads.fits(*heads):
        q, k, v = reference.unpack_qkv(qkv, num_heads)
        return _run_cpp(q, k, v, None, False, dropout_p, scale, *heads).transpose(1, 2).flatten(2)
    if dropout_p > 0.0 or q_norm is not None or rope is not None:
        return _attention_general.run_packed(qkv, num_heads, dropout_p, scale, *heads, "cpp")
    return _packed_fwd_op(qkv, num_heads, scale, "cpp")[0]


def _run_torch(q, k, v, attn_mask, is_causal, dropout_p, scale, *heads):
    q, k = _prepared(q, k, *heads)
    if attn_mask is not None:  # SDPA takes no vector, and no float mask of another dtype
        attn_mask = torch.atleast_2d(attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype))
    if attn_mask is not None and is_causal:  # SDPA takes one or the other
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        is_bool = attn_mask.dtype == torch.bool
        attn_mask = attn_mask & keep if is_bool else attn_mask.masked_fill(~keep, float("-inf"))
        is_causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)


def _run_torch_packed(qkv, num_heads, dropout_p, scale, *heads):
    q, k, v = reference.unpack_qkv(qkv, num_heads)
    return _run_torch(q, k, v, None, False, dropout_p, scale, *heads).transpose(1, 2).flatten(2)


def _run_reference(q, k, v, attn_mask, is_causal, dropout_p, scale, *heads):
    dropout = _reference_dropout(q, dropout_p)
    q, k = _prepared(q, k, *heads)
    return reference.attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, **dropout)


def _run_reference_packed(qkv, num_heads, dropout_p, scale, *heads):
    q, k, v = reference.unpack_qkv(qkv, num_heads)
    return _run_reference(q, k, v, None, False, dropout_p, scale, *heads).transpose(1, 2).flatten(2)


def _reference_dropout(x: Tensor, dropout_p: float) -> dict[str, Any]:
    """The triton backend's own mask, as the seed comes from the same generator."""
    if dropout_p == 0.0:
        return {}
    return {"dropout_p": dropout_p, "dropout_seed": _attention_general.draw_seed(x.device)}


UNTIMED = "it has not run on a GPU yet, only on a model of one"

ATTENTION = Op(
    NAME,
    Backend("triton", _run_triton, _why_not_triton, ("cuda",)),
    Backend("cuda", _run_cuda, _why_not_cuda, only_by_name=UNTIMED),
    Backend("cpp", _run_cpp, _why_not_cpp, ("cpu",)),
    Backend("torch", _run_torch),
    Backend("reference", _run_reference),
)
ATTENTION_PACKED = Op(
    PACKED,
    Backend("triton", _run_triton_packed, _why_not_triton_packed, ("cuda",)),
    Backend("cuda", _run_cuda_packed, _why_not_cuda_packed, only_by_name=UNTIMED),
    Backend("cpp", _run_cpp_packed, _why_not_cpp_packed, ("cpu",)),
    Backend("torch", _run_torch_packed),
    Backend("reference", _run_reference_packed),
)
