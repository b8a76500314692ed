"""Rows of a head as column parts: a head dim of 80 is held as 64 + 16 columns, because tiles are powers of two.

Every value here is a tuple of parts. Pointers are those of one head; strides count in units of UNIT elements.
"""

# ruff: noqa: RUF005 - Triton knows no (*parts, part)
from __future__ import annotations

import triton
import triton.language as tl

from ._math import add_dot, cast, dot


@triton.constexpr_function
def before(sizes, i):
    """Where part ``i`` begins."""
    return sum(sizes[:i])


@triton.jit
def load(ptr, offs_n, stride_n, length, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr):
    """Rows of a head in column parts (rows, COLS[i]): a head dim of 80 is 64 + 16. Zero outside the tensor."""
    parts = ()
    for i in tl.static_range(len(COLS)):
        cols = before(COLS, i) + tl.arange(0, COLS[i])
        mask = offs_n[:, None] < length
        if before(COLS, i + 1) > D:
            mask = mask & (cols[None, :] < D)
        parts = parts + (tl.load(ptr + (offs_n[:, None] * stride_n * UNIT + cols[None, :]), mask=mask, other=0.0),)
    return parts


@triton.jit
def load_tiles(ptr, stride_n, length, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """All rows of a head in tiles of ROWS[j] rows, each in column parts."""
    tiles = ()
    for j in tl.static_range(len(ROWS)):
        offs_n = before(ROWS, j) + tl.arange(0, ROWS[j])
        tiles = tiles + (load(ptr, offs_n, stride_n, length, D, UNIT, COLS),)
    return tiles


@triton.jit
def store(ptr, offs_n, stride_n, length, values, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr):
    """Round and store float32 column parts (rows, COLS[i])."""
    for i in tl.static_range(len(COLS)):
        cols = before(COLS, i) + tl.arange(0, COLS[i])
        mask = offs_n[:, None] < length
        if before(COLS, i + 1) > D:
            mask = mask & (cols[None, :] < D)
        ptrs = ptr + (offs_n[:, None] * stride_n * UNIT + cols[None, :])
        tl.store(ptrs, cast(values[i], ptr.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(COLS)):
        parts = parts + (tl.zeros((ROWS, tl.constexpr(COLS[i])), tl.float32),)
    return parts


@triton.jit
def zeros_t(ROWS: tl.constexpr, COLS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(ROWS)):
        parts = parts + (tl.zeros((tl.constexpr(ROWS[i]), COLS), tl.float32),)
    return parts


@triton.jit
def scaled(parts, factor):
    products = ()
    for i in tl.static_range(len(parts)):
        products = products + (parts[i] * factor,)
    return products


@triton.jit
def inner(a, b):
    """a b^T, summed over the column parts."""
    total = dot(a[0], b[0].T)
    for i in tl.static_range(1, len(a)):
        total = add_dot(a[i], b[i].T, total)
    return total


@triton.jit
def outer(weights, values, acc):
    """acc + weights values, part by part; weights are rounded to the dtype of values."""
    weights = cast(weights, values[0].dtype)
    parts = ()
    for i in tl.static_range(len(values)):
        parts = parts + (add_dot(weights, values[i], acc[i]),)
    return parts


@triton.jit
def outer_t(values, weights, acc):
    """acc + values^T weights, part by part: the transpose of outer without turning weights (queries in columns)."""
    parts = ()
    for i in tl.static_range(len(values)):
        parts = parts + (add_dot(values[i].T, weights, acc[i]),)
    return parts


@triton.jit
def row_sum(a, b):
    """sum(a * b) over the columns, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total
