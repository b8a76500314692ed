"""The last few rows of a head, as columns: a block of 64 queries (or keys) would be mostly padding.

A matrix instruction of Hopper takes 64 rows, but as few as 8 columns. So the 5 queries that 197 has left after three
blocks of 64 are turned: scores are (keys, queries), and only the queries' side is short. Sums run over the same keys
in the same dtype as those of a full block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import cast
from ._softmax import LOG2_E, load_statistics, probabilities, save_statistics, weights
from ._tiles import inner, load, outer_t, row_sum, scaled, store, turned, zeros_t


@triton.jit
def fwd_in_columns(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qn, stride_kn, stride_vn, stride_on,
    scale, begin, statistics, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, QUERIES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Output and statistics of the queries from ``begin`` on, against STEP keys at a time.

    Pointers to rows are those of the head; its first statistic is number ``statistics``.
    """
    offs_m = begin + tl.arange(0, QUERIES)
    q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
    row_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc_t = zeros_t(COLS, QUERIES)
    for start_n in tl.range(0, Nk, STEP, num_stages=2):
        offs_n = start_n + tl.arange(0, STEP)
        k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        scores = tl.where(offs_n[:, None] < Nk, inner(k, q), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        p = weights(scores, new_max[None, :], scale, False)
        shrink = tl.exp2((row_max - new_max) * (scale * LOG2_E))
        total = total * shrink + tl.sum(p, 0)
        acc_t = outer_t(v, cast(p, q[0].dtype), scaled(acc_t, shrink[None, :]))
        row_max = new_max
    store(out_ptr, offs_m, stride_on, Nq, turned(scaled(acc_t, 1.0 / total[None, :]), COLS), D, UNIT, COLS)
    save_statistics(lse_ptr, statistics + offs_m, 0, offs_m < Nq, row_max, total, scale, False)


@triton.jit
def dq_in_columns(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr,
    stride_qn, stride_kn, stride_vn, stride_on, stride_don, stride_dqn,
    scale, begin, statistics, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, QUERIES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dQ, and delta, of the queries from ``begin`` on; otherwise as ``fwd_in_columns``."""
    offs_m = begin + tl.arange(0, QUERIES)
    out = load(out_ptr, offs_m, stride_on, Nq, D, UNIT, COLS)
    dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
    delta = row_sum(out, dout)
    tl.store(delta_ptr + statistics + offs_m, delta, mask=offs_m < Nq)
    q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
    top, log = load_statistics(lse_ptr, statistics + offs_m, 0, offs_m < Nq, False)
    dq_t = zeros_t(COLS, QUERIES)
    for start_n in tl.range(0, Nk, STEP, num_stages=2):
        offs_n = start_n + tl.arange(0, STEP)
        k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        scores = tl.where(offs_n[:, None] < Nk, inner(k, q), float("-inf"))
        p = probabilities(scores, top[None, :], log[None, :], scale, False)
        dq_t = outer_t(k, cast(p * (inner(v, dout) - delta[None, :]), q[0].dtype), dq_t)
    store(dq_ptr, offs_m, stride_dqn, Nq, turned(scaled(dq_t, scale), COLS), D, UNIT, COLS)


@triton.jit
def dkv_in_columns(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    stride_qn, stride_kn, stride_vn, stride_don, stride_dkn, stride_dvn,
    scale, begin, statistics, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dK and dV of the keys from ``begin`` on; otherwise as ``fwd_in_columns``."""
    offs_n = begin + tl.arange(0, KEYS)
    k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
    v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
    dk_t = zeros_t(COLS, KEYS)
    dv_t = zeros_t(COLS, KEYS)
    for start_m in tl.range(0, Nq, STEP, num_stages=2):
        offs_m = start_m + tl.arange(0, STEP)
        q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
        dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
        top, log = load_statistics(lse_ptr, statistics + offs_m, 0, offs_m < Nq, False)
        delta = tl.load(delta_ptr + statistics + offs_m, mask=offs_m < Nq, other=0.0)
        p = probabilities(inner(q, k), top[:, None], log[:, None], scale, False)
        dv_t = outer_t(dout, cast(p, k[0].dtype), dv_t)
        dk_t = outer_t(q, cast(p * (inner(dout, v) - delta[:, None]), k[0].dtype), dk_t)
    store(dk_ptr, offs_n, stride_dkn, Nk, turned(scaled(dk_t, scale), COLS), D, UNIT, COLS)
    store(dv_ptr, offs_n, stride_dvn, Nk, turned(dv_t, COLS), D, UNIT, COLS)
