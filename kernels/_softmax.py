"""Softmax on a tile of scores, and what the forward saves of each query for the backward."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weights(scores, row_max, scale, IEEE: tl.constexpr):
    """exp(scale * (scores - row_max)). float32 subtracts first, so large scores cancel exactly; half takes one fma."""
    if IEEE:
        return tl.exp2((scores - row_max) * (scale * LOG2_E))
    return tl.exp2(scores * (scale * LOG2_E) - row_max * (scale * LOG2_E))


@triton.jit
def statistic_rows(Nq, N, BLOCK: tl.constexpr):
    """B * H * Nq, in a kernel that gives every head a program for each BLOCK of N rows."""
    return (tl.num_programs(0) // tl.cdiv(N, BLOCK)).to(tl.int64) * Nq


@triton.jit
def save_statistics(ptr, offs, rows, inside, row_max, row_sum, scale, IEEE: tl.constexpr):
    """What the backward needs to know of a query: its log-sum-exp. float32 keeps the row maximum and, ``rows`` values
    on, log2 of the sum: their sum would be rounded, and all weights of the row with it."""
    if IEEE:
        tl.store(ptr + offs, row_max, mask=inside)
        tl.store(ptr + rows + offs, tl.log2(row_sum), mask=inside)
    else:
        tl.store(ptr + offs, row_max * scale + tl.log2(row_sum) * LN_2, mask=inside)


@triton.jit
def load_statistics(ptr, offs, rows, inside, IEEE: tl.constexpr):
    """(row maximum, log2 of the sum), or (log-sum-exp, 0); of a padded query inf, hence p = 0."""
    top = tl.load(ptr + offs, mask=inside, other=float("inf"))
    log = tl.load(ptr + rows + offs, mask=inside, other=0.0) if IEEE else 0.0 * top
    return top, log


@triton.jit
def probabilities(scores, top, log, scale, IEEE: tl.constexpr):
    """The weights of the forward, from what it saved."""
    if IEEE:
        return tl.exp2((scores - top) * (scale * LOG2_E) - log)
    return tl.exp2(scores * (scale * LOG2_E) - top * LOG2_E)
