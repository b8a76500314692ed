"""Attention of a few queries, such as the class token's row alone, forward and backward.

One to four queries leave nothing to multiply in tiles: memory sets the pace. A program takes a head and reads its keys
and values once, in large blocks; products run on the FMA units, in float32. The backward is one pass too: what so few
queries add to dK and dV is complete as soon as a block is read, and dQ stays in registers.

Meaning: fastvit.reference.attention.
"""

# ruff: noqa: RUF005 - Triton knows no (*parts, part)
from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import AotCase, few_settings
from ._launch import Launch, Replay, facts, made, run_on
from ._math import cast
from ._softmax import load_statistics, probabilities, save_statistics, weights
from ._tiles import before, load, scaled, store
from .attention import _RUNTIME, _check, _head, _launch, _rows, new_statistics

MOST_QUERIES = 4


def attention_few_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``attention_fwd`` of at most MOST_QUERIES queries."""
    _check(q, scale)
    q, k, v = (_rows(t) for t in (q, k, v))
    out, lse = _results(q)
    if q.numel():
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        run_on(tensors, ("attention_few_fwd", scale), lambda: [_fwd_launch(*tensors.values(), scale)])
    return out, lse


def made_few_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Replay | None:
    """The launch of ``attention_few_fwd``, where one for such tensors was made before."""
    return next(iter(made(("attention_few_fwd", scale, facts((q, k, v, *_results(q)))))), None)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, nq, dim = q.shape
    return q.new_empty(batch, nq, heads, dim).transpose(1, 2), new_statistics(q, q.shape[:3])


def attention_few_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of ``attention_few_fwd`` into dq, dk and dv; the same from run to run."""
    _check(q, scale)
    dout, q, k, v, out = (_rows(t) for t in (dout, q, k, v, out))
    if q.numel():
        tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        arguments = (dout, q, k, v, out, lse, scale, dq, dk, dv)
        run_on(tensors, ("attention_few_bwd", scale), lambda: [_bwd_launch(*arguments)])


def aot_cases() -> list[AotCase]:
    """The class token and the largest number of queries, at every way to cut a head dim."""
    cases = []
    sizes = [(queries, dim, torch.bfloat16) for queries, dim in product((1, MOST_QUERIES), (64, 80, 128))]
    sizes += [(1, 64, torch.float16), (1, 64, torch.float32), (MOST_QUERIES, 128, torch.float32)]
    for queries, dim, dtype in sizes:
        q, out = (torch.empty(2, queries, 12, dim, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        k, v = torch.empty(2, 197, 2, 12, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
        lse = new_statistics(q, q.shape[:3])
        launches = (_fwd_launch(q, k, v, out, lse, 0.125), _bwd_launch(out, q, k, v, out, lse, 0.125, q, k, v))
        for launch in launches:
            kernel = launch.kernel.fn.__name__.strip("_")
            cases.append(launch.aot_case(f"{kernel}_{str(dtype).removeprefix('torch.')}_d{dim}_q{queries}"))
    return cases


def _fwd_launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Launch:
    return _few(_attention_few_fwd_kernel, "fwd", (q, k, v, out), lse, k.shape[2], scale)


def _bwd_launch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, dq: Tensor, dk: Tensor,
    dv: Tensor,
) -> Launch:  # fmt: skip
    return _few(_attention_few_bwd_kernel, "bwd", (q, k, v, out, dout, dq, dk, dv), lse, k.shape[2], scale)


def _few(kernel, name: str, rows: tuple[Tensor, ...], lse: Tensor, keys: int, scale: float) -> Launch:
    batch, heads, queries, dim = rows[0].shape
    settings = few_settings(name, rows[0].dtype, dim, queries)
    return _launch(kernel, settings, batch * heads, rows, (lse,), (scale, heads, queries, keys))


@triton.jit
def _place(H):
    """(batch, head) of this program, in int64: their offsets can pass 2^31."""
    return (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)


@triton.jit
def _few_rows(ptr, stride_n, length, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows, each in float32 parts (COLS[i],); past the end the last one again."""
    rows = ()
    for m in tl.static_range(ROWS):
        parts = ()
        for i in tl.static_range(len(COLS)):
            cols = before(COLS, i) + tl.arange(0, COLS[i])
            ptrs = ptr + tl.minimum(m, length - 1) * stride_n * UNIT + cols
            parts = parts + (tl.load(ptrs, mask=cols < D, other=0.0).to(tl.float32),)
        rows = rows + (parts,)
    return rows


@triton.jit
def _store_row(ptr, parts, inside, D: tl.constexpr, COLS: tl.constexpr):
    for i in tl.static_range(len(COLS)):
        cols = before(COLS, i) + tl.arange(0, COLS[i])
        tl.store(ptr + cols, cast(parts[i], ptr.dtype.element_ty), mask=(cols < D) & inside)


@triton.jit
def _dot_row(rows, row):
    """rows . row, summed over the columns."""
    total = tl.sum(rows[0].to(tl.float32) * row[0][None, :], 1)
    for i in tl.static_range(1, len(rows)):
        total += tl.sum(rows[i].to(tl.float32) * row[i][None, :], 1)
    return total


@triton.jit
def _add_rows(weights, rows, acc):
    """acc + weights . rows, summed over the rows."""
    parts = ()
    for i in tl.static_range(len(rows)):
        parts = parts + (acc[i] + tl.sum(weights[:, None] * rows[i].to(tl.float32), 0),)
    return parts


@triton.jit
def _add_products(weights, row, acc):
    """acc + weights row^T."""
    parts = ()
    for i in tl.static_range(len(row)):
        parts = parts + (acc[i] + weights[:, None] * row[i][None, :],)
    return parts


@triton.jit
def _zero_row(COLS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(COLS)):
        parts = parts + (tl.zeros((tl.constexpr(COLS[i]),), tl.float32),)
    return parts


@triton.jit
def _zero_rows(ROWS: tl.constexpr, COLS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(COLS)):
        parts = parts + (tl.zeros((ROWS, tl.constexpr(COLS[i])), tl.float32),)
    return parts


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_few_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All queries of a head against its keys, block by block, each with a running maximum of its own."""
    b, h = _place(H)
    q = _few_rows(_head(q_ptr, b, h, stride_qb, stride_qh, UNIT), stride_qn, Nq, D, UNIT, COLS, QUERIES)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    tops = ()
    sums = ()
    accs = ()
    for _ in tl.static_range(QUERIES):
        tops = tops + (tl.full((), float("-inf"), tl.float32),)
        sums = sums + (tl.full((), 0.0, tl.float32),)
        accs = accs + (_zero_row(COLS),)
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        new_tops = ()
        new_sums = ()
        new_accs = ()
        for m in tl.static_range(QUERIES):
            scores = tl.where(offs_n < Nk, _dot_row(k, q[m]), float("-inf"))
            top = tl.maximum(tops[m], tl.max(scores, 0))
            p = weights(scores, top, scale, True)
            shrink = weights(tops[m], top, scale, True)
            new_tops = new_tops + (top,)
            new_sums = new_sums + (sums[m] * shrink + tl.sum(p, 0),)
            new_accs = new_accs + (_add_rows(p, v, scaled(accs[m], shrink)),)
        tops = new_tops
        sums = new_sums
        accs = new_accs
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    lse_ptr += (b * H + h) * Nq
    rows = tl.num_programs(0).to(tl.int64) * Nq
    for m in tl.static_range(QUERIES):
        _store_row(out_ptr + m * stride_on * UNIT, scaled(accs[m], 1.0 / sums[m]), m < Nq, D, COLS)
        save_statistics(lse_ptr, m, rows, m < Nq, tops[m], sums[m], scale, q_ptr.dtype.element_ty == tl.float32)


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_few_bwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All queries of a head against its keys, block by block: dK and dV are stored at once, dQ adds up.

    rest is the sum of dS, mean that of P K.
    """
    b, h = _place(H)
    q = _few_rows(_head(q_ptr, b, h, stride_qb, stride_qh, UNIT), stride_qn, Nq, D, UNIT, COLS, QUERIES)
    out = _few_rows(_head(out_ptr, b, h, stride_ob, stride_oh, UNIT), stride_on, Nq, D, UNIT, COLS, QUERIES)
    dout = _few_rows(_head(dout_ptr, b, h, stride_dob, stride_doh, UNIT), stride_don, Nq, D, UNIT, COLS, QUERIES)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    dk_ptr = _head(dk_ptr, b, h, stride_dkb, stride_dkh, UNIT)
    dv_ptr = _head(dv_ptr, b, h, stride_dvb, stride_dvh, UNIT)
    lse_ptr += (b * H + h) * Nq
    rows = tl.num_programs(0).to(tl.int64) * Nq
    IEEE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    dq = ()
    rest = ()
    mean = ()
    for _ in tl.static_range(QUERIES):
        dq = dq + (_zero_row(COLS),)
        rest = rest + (tl.full((), 0.0, tl.float32),)
        mean = mean + (_zero_row(COLS),)
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        dk = _zero_rows(BLOCK_N, COLS)
        dv = _zero_rows(BLOCK_N, COLS)
        new_dq = ()
        new_rest = ()
        new_mean = ()
        for m in tl.static_range(QUERIES):
            # a padded key has a score of -inf: p = 0
            top, log = load_statistics(lse_ptr, m, rows, m < Nq, IEEE)
            scores = tl.where(offs_n < Nk, _dot_row(k, q[m]), float("-inf"))
            p = probabilities(scores, top, log, scale, IEEE)
            delta = tl.sum(out[m][0] * dout[m][0], 0)
            for i in tl.static_range(1, len(COLS)):
                delta += tl.sum(out[m][i] * dout[m][i], 0)
            ds = p * (_dot_row(v, dout[m]) - delta) * scale
            dv = _add_products(p, dout[m], dv)
            dk = _add_products(ds, q[m], dk)
            new_dq = new_dq + (_add_rows(ds, k, dq[m]),)
            new_rest = new_rest + (rest[m] + tl.sum(ds, 0),)
            new_mean = new_mean + (_add_rows(p, k, mean[m]),)
        dq = new_dq
        rest = new_rest
        mean = new_mean
        store(dk_ptr, offs_n, stride_dkn, Nk, dk, D, UNIT, COLS)
        store(dv_ptr, offs_n, stride_dvn, Nk, dv, D, UNIT, COLS)
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, UNIT)
    for m in tl.static_range(QUERIES):
        # dS sums to zero but for the rounding of out in delta, and keys far from zero would not forgive it
        row = ()
        for i in tl.static_range(len(COLS)):
            row = row + (dq[m][i] - rest[m] * mean[m][i],)
        _store_row(dq_ptr + m * stride_dqn * UNIT, row, m < Nq, D, COLS)
