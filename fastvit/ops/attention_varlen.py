"""Self-attention over samples of different lengths that lie one after another: no padding, no mask."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import Backend, Op
from ..reference import HeadNorm, Rope
from . import _contract, _heads, _register
from ._attention_general import backward, cpp, draw_seed, kernels, meaning, setup_context
from .attention import _prepared, _reference_dropout, _run_torch, _why_not_cpp, _why_not_triton

NAME = "attention_varlen"


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """``fastvit.ops.attention`` within each of S samples, e.g. images of different sizes in one batch.

    q, k, v     (T, H, D)  float32 | bfloat16 | float16, any strides: ``*qkv.unbind(1)`` of a packed (T, 3, H, D) is
                           read in place
    cu_seqlens  (S + 1,)   int32 | int64, from 0 to T, never falling: sample s has the rows from cu_seqlens[s] to
                           cu_seqlens[s + 1]
    max_seqlen             no sample has more rows
    rope                   its table has a row for each of the T rows, (T, 2 * D) or (H, T, 2 * D): where a row is not
                           to be rotated, sines of 0 and cosines of 1
    returns     (T, H, D)  dtype of q

    The values of cu_seqlens are checked on the CPU only; on a GPU reading them would stop the stream.
    Raises ValueError for a wrong shape, dtype or device, Unsupported where a forced backend cannot run.
    Meaning: fastvit.reference.attention_varlen.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, dropout_p)
    _check_heads(q, q_norm, k_norm, rope)
    q, k, v = _contract.cast(_contract.autocast_dtype(q), q, k, v)  # type: ignore[assignment]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OP(q, k, v, cu_seqlens, max_seqlen, is_causal, dropout_p, scale, q_norm, k_norm, rope)


def _check(q, k, v, cu_seqlens, max_seqlen, dropout_p) -> None:
    if q.dim() != 3:
        raise ValueError(f"{NAME}: q has shape {tuple(q.shape)}, expected (T, H, D)")
    _contract.check_together(NAME, "q", q, k=k, v=v)
    for name, tensor in {"k": k, "v": v}.items():
        _contract.check_shape(NAME, name, tensor, tuple(q.shape), "like q")
        if _contract.autocast_dtype(q) is None:
            _contract.check_dtype(NAME, name, tensor, (q.dtype,), "like q")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{NAME}: dropout_p is {dropout_p}, expected a probability in [0, 1)")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{NAME}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,)")
    _contract.check_dtype(NAME, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "as row numbers")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{NAME}: cu_seqlens is on {cu_seqlens.device}, expected {q.device} like q")
    if max_seqlen < 1:
        raise ValueError(f"{NAME}: max_seqlen is {max_seqlen}, expected at least 1")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_rows(cu_seqlens.tolist(), max_seqlen, q.shape[0])


def _check_heads(q: Tensor, q_norm: HeadNorm | None, k_norm: HeadNorm | None, rope: Rope | None) -> None:
    if rope is not None and rope.num_prefix:
        raise ValueError(f"{NAME}: rope.num_prefix is {rope.num_prefix}, expected 0: samples share no first row")
    _heads.check(NAME, _as_heads(q), (q.shape[0], q.shape[0]), q_norm, k_norm, rope, "T")


def _check_rows(bounds: list[int], max_seqlen: int, rows: int) -> None:
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"{NAME}: cu_seqlens goes from {bounds[0]} to {bounds[-1]}, expected 0 to {rows}, q's rows")
    lengths = [end - begin for begin, end in pairwise(bounds)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"{NAME}: cu_seqlens falls by {-min(lengths)} after sample {lengths.index(min(lengths))}")
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(f"{NAME}: cu_seqlens holds a sample of {max(lengths)} rows, expected at most {max_seqlen}")


def _as_heads(rows: Tensor) -> Tensor:
    """(T, H, D) seen as (1, H, T, D)."""
    return rows.transpose(0, 1).unsqueeze(0)


def _options(*flat_and_rest):
    *flat, cu_seqlens, max_seqlen, is_causal, dropout_p, dropout_seed, scale, _ = flat_and_rest
    ragged = (cu_seqlens.contiguous(), max_seqlen, kernels().Preparation(*flat))
    return kernels().Options(scale, None, is_causal, dropout_p, dropout_seed, *ragged)


def _cpp_options(*flat_and_rest):
    *flat, cu_seqlens, _, is_causal, dropout_p, dropout_seed, scale, _ = flat_and_rest
    return *flat, None, is_causal, dropout_p, dropout_seed, scale, cu_seqlens


def _fwd(q, k, v, *rest):
    rows = [_as_heads(tensor) for tensor in (q, k, v)]
    if rest[-1] == "cpp":
        out, top, log = cpp().attention_general_fwd(*rows, *_cpp_options(*rest))
    else:
        out, top, log = kernels().attention_general_fwd(*rows, _options(*rest))
    return out[0].transpose(0, 1), top[0], log[0]


def _fwd_fake(q, k, v, *rest):
    rows, heads, _ = q.shape
    return q.new_empty(q.shape), *(q.new_empty(heads, rows, dtype=torch.float32) for _ in range(2))


def _bwd(dout, q, k, v, out, top, log, *rest):
    grads = [tensor.new_empty(tensor.shape) for tensor in (q, k, v)]
    rows = [_as_heads(tensor) for tensor in (dout, q, k, v, out)]
    if rest[-1] == "cpp":
        statistics, heads = (top[None], log[None]), map(_as_heads, grads)
        sums = cpp().attention_general_bwd(*rows, *statistics, *_cpp_options(*rest), *heads)
    else:
        sums = kernels().attention_general_bwd(*rows, top[None], log[None], _options(*rest), *map(_as_heads, grads))
    return *grads, *_heads.weight_gradients(sums, rest[:4])


def _bwd_fake(dout, q, k, v, out, top, log, *rest):
    grads = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    return *grads, *_heads.fake_weight_gradients(top, rest[:4])


_OPTIONS = (
    f"{_heads.SCHEMA}, Tensor cu_seqlens, int max_seqlen, bool is_causal, float dropout_p, Tensor? dropout_seed,"
    " float scale, str backend"
)
_fwd_op = _register.define(
    f"{NAME}_fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor top, Tensor log, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    setup_context(ctx, inputs, output, of_rows=3)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple:
    return backward(ctx, dout, _bwd_op, of_rows=3)


_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_MEANING = (*_heads.NAMES, "cu_seqlens", "max_seqlen", "is_causal", "dropout_p", "dropout_seed", "scale")
_register.register_double_backward(
    f"{NAME}_bwd",
    meaning(reference.attention_varlen),
    inputs=("q", "k", "v", *_MEANING),
    arguments=("dout", "q", "k", "v", "out", "top", "log", *_MEANING, "backend"),
)


def _why_not_cpp_varlen(q, k, v, cu_seqlens, max_seqlen, is_causal, dropout_p, scale, *heads):
    return _why_not_cpp(q, k, v, None, is_causal, dropout_p, scale)


def _why_not(q, k, v, cu_seqlens, max_seqlen, is_causal, dropout_p, scale, *heads):
    return _why_not_triton(_as_heads(q), _as_heads(k), _as_heads(v), None, is_causal, dropout_p, scale, *heads)


def _run_triton(q, k, v, *rest_and_heads):
    *rest, q_norm, k_norm, rope = rest_and_heads
    return _run_kernels("triton", q, k, v, _heads.flat(q_norm, k_norm, rope), *rest)


def _run_cpp(q, k, v, *rest_and_heads):
    *rest, q_norm, k_norm, rope = rest_and_heads
    if not _heads.fits(q_norm, k_norm, rope):
        q, k = _prepared_rows(q, k, q_norm, k_norm, rope)
        return _run_kernels("cpp", q, k, v, _heads.Flat(), *rest)
    return _run_kernels("cpp", q, k, v, _heads.flat(q_norm, k_norm, rope), *rest)


def _run_kernels(backend, q, k, v, flat, cu_seqlens, max_seqlen, is_causal, dropout_p, scale):
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    return _fwd_op(q, k, v, *flat, cu_seqlens, max_seqlen, is_causal, dropout_p, seed, scale, backend)[0]


def _prepared_rows(q, k, *heads):
    if all(part is None for part in heads):
        return q, k
    return (t.transpose(0, 1) for t in _prepared(q.transpose(0, 1), k.transpose(0, 1), *heads))


def _run_padded(q, k, v, cu_seqlens, max_seqlen, is_causal, dropout_p, scale, *heads):
    """Padded: shapes that do not depend on cu_seqlens need no look at its values."""
    rows = q.shape[0]
    q, k = _prepared_rows(q, k, *heads)
    (q, k, v), mask = reference.pad_samples((q, k, v), cu_seqlens, max_seqlen)
    out = _run_torch(q, k, v, mask, is_causal, dropout_p, scale)
    return reference.unpad_samples(out, cu_seqlens, rows)


def _run_reference(q, k, v, cu_seqlens, max_seqlen, is_causal, dropout_p, scale, q_norm, k_norm, rope):
    options = {"is_causal": is_causal, "scale": scale, "q_norm": q_norm, "k_norm": k_norm, "rope": rope}
    dropout = _reference_dropout(q, dropout_p)
    return reference.attention_varlen(q, k, v, cu_seqlens, max_seqlen, **options, **dropout)


OP = Op(
    NAME,
    Backend("triton", _run_triton, _why_not, ("cuda",)),
    Backend("cpp", _run_cpp, _why_not_cpp_varlen, ("cpu",)),
    Backend("torch", _run_padded),
    Backend("reference", _run_reference),
)
