"""Attention of a few queries, such as the class token's row alone, forward and backward.

One to four queries leave nothing to multiply in tiles: memory sets the pace. A program takes a head and reads its keys
and values once, in large blocks; products run on the FMA units, unrounded. The backward is one pass too: what a few
queries add to dK and dV is complete as soon as a block is read, and dQ stays in registers.

Meaning: fastvit.reference.attention.
"""

# ruff: noqa: RUF005 - Triton knows no (*parts, part)
from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import before, load, store


@triton.jit
def _place(H):
    """(batch, head) of this program, in int64: their offsets can pass 2^31."""
    return (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)


@triton.jit
def _row(ptr, D: tl.constexpr, COLS: tl.constexpr):
    """One row of a head in float32 parts (COLS[i],)."""
    parts = ()
    for i in tl.static_range(len(COLS)):
        cols = before(COLS, i) + tl.arange(0, COLS[i])
        parts = parts + (tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def _rows(ptr, stride_n, length, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows, each in parts; past the end the last one again."""
    rows = ()
    for m in tl.static_range(ROWS):
        rows = rows + (_row(ptr + tl.minimum(m, length - 1) * stride_n * UNIT, D, COLS),)
    return rows


@triton.jit
def _store_row(ptr, parts, factor, inside, D: tl.constexpr, COLS: tl.constexpr):
    for i in tl.static_range(len(COLS)):
        cols = before(COLS, i) + tl.arange(0, COLS[i])
        tl.store(ptr + cols, _rounded(parts[i] * factor, ptr.dtype.element_ty), mask=(cols < D) & inside)


@triton.jit
def _times(rows, row):
    """rows . row, over the columns."""
    total = tl.sum(rows[0] * row[0][None, :], 1)
    for i in tl.static_range(1, len(rows)):
        total += tl.sum(rows[i] * row[i][None, :], 1)
    return total


@triton.jit
def _weighted(weights, rows, acc, shrink):
    """acc * shrink + weights . rows, over the rows."""
    parts = ()
    for i in tl.static_range(len(rows)):
        parts = parts + (acc[i] * shrink + tl.sum(weights[:, None] * rows[i], 0),)
    return parts


@triton.jit
def _add_outer(weights, row, acc):
    """acc + weights row^T."""
    parts = ()
    for i in tl.static_range(len(row)):
        parts = parts + (acc[i] + weights[:, None] * row[i][None, :],)
    return parts
