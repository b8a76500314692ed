"""Device helpers shared by the kernels."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), IEEE products summed in float32.

    The interpreter's bfloat16 dot is wrong, and its float32 dot adds in another order for another shape or transpose,
    as no GPU does: the scores of a backward must be those of its forward. It sums in float64 and rounds once.
    """
    if INTERPRETED:
        products = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        return products if acc is None else products + acc
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_dot(a, b, acc):
    """acc + a @ b. In float32 the product has a sum of its own: one chain over a whole reduction is less accurate than
    stock's, which works in parts."""
    if a.dtype == tl.float32:
        # an fma, because the compiler would turn an addition back into one chain
        return tl.fma(dot(a, b), 1.0, acc)
    else:
        return dot(a, b, acc)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to nearest even in ``dtype``; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
