"""q and k on their way into the attention kernels: normalised over the head dim, rotated by their position.

A rotated head is held in pairs of column parts (a, b) whose columns turn together: column c with c + D / 2, or column
2 i with 2 i + 1. Then a rotation and its inverse mix whole parts and nothing crosses columns; scores do not mind the
order of the columns. A head that is not rotated is held in the parts of ``_tiles``.

Meaning: fastvit.reference.prepare_heads.
"""

# ruff: noqa: RUF005 - Triton knows no (*parts, part)
from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from ._math import cast
from ._tiles import before

HALF, INTERLEAVED = tl.constexpr("half"), tl.constexpr("interleaved")


@dataclass(frozen=True)
class Preparation:
    """What happens to q and k before their product.

    q_weight and so on  (D,)  optional
    norm                "" | "layer" | "rms", over the head dim
    q_eps, k_eps        above 0
    rope                broadcastable to (B, H, L, 2 * D): sines, then cosines; optional
    num_prefix          tokens before the table's first row
    half                which columns turn together
    """

    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    norm: str = ""
    q_eps: float = 1e-6
    k_eps: float = 1e-6
    rope: Tensor | None = None
    num_prefix: int = 0
    half: bool = False

    @property
    def pairs(self) -> str:
        if self.rope is None:
            return ""
        return str(HALF.value if self.half else INTERLEAVED.value)

    def readable(self) -> Preparation:
        """The same with its tensors as the kernels read them."""
        names = ("q_weight", "q_bias", "k_weight", "k_bias")
        found = {name: None if (t := getattr(self, name)) is None else t.contiguous() for name in names}
        rope = None if self.rope is None else self.rope.float().contiguous()
        return replace(self, rope=rope, **found)

    def numbers(self, batch: int, heads: int) -> tuple[float, ...]:
        """The kernels' arguments of stride_rb to num_prefix; the table's strides count in rows."""
        strides: tuple[int, ...] = (0, 0)
        if self.rope is not None:
            rows, width = self.rope.shape[-2:]
            strides = tuple(stride // width for stride in self.rope.expand(batch, heads, rows, width).stride()[:2])
        return *strides, self.q_eps, self.k_eps, self.num_prefix


@triton.constexpr_function
def widths(COLS, PAIRS):
    """The width of every part."""
    if PAIRS == "":
        return COLS
    return tuple(width for width in COLS for _ in range(2))


@triton.jit
def load_heads(ptr, offs_n, stride_n, inside, other, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr,
               PAIRS: tl.constexpr):  # fmt: skip
    """Rows of a head in parts; ``other`` where ``inside`` (rows) is False and past the head dim."""
    parts = ()
    for i in tl.static_range(len(COLS)):
        rows = ptr + offs_n[:, None] * stride_n * UNIT
        if PAIRS == "half":
            cols = (before(COLS, i) + tl.arange(0, COLS[i]))[None, :]
            mask = inside[:, None]
            if 2 * before(COLS, i + 1) > D:
                mask = mask & (cols < D // 2)
            parts = parts + (tl.load(rows + cols, mask=mask, other=other),)
            parts = parts + (tl.load(rows + (D // 2 + cols), mask=mask, other=other),)
        elif PAIRS == "interleaved":
            cols = (2 * before(COLS, i) + tl.arange(0, 2 * COLS[i]))[None, :]
            mask = inside[:, None]
            if 2 * before(COLS, i + 1) > D:
                mask = mask & (cols < D)
            pairs = tl.load(rows + cols, mask=mask, other=other)
            parts = parts + tl.split(tl.reshape(pairs, (pairs.shape[0], tl.constexpr(COLS[i]), 2)))
        else:
            cols = (before(COLS, i) + tl.arange(0, COLS[i]))[None, :]
            mask = inside[:, None]
            if before(COLS, i + 1) > D:
                mask = mask & (cols < D)
            parts = parts + (tl.load(rows + cols, mask=mask, other=other),)
    return parts


@triton.jit
def store_heads(ptr, offs_n, stride_n, length, values, D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr,
                PAIRS: tl.constexpr):  # fmt: skip
    """Round and store float32 parts."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    for i in tl.static_range(len(COLS)):
        rows = ptr + offs_n[:, None] * stride_n * UNIT
        mask = offs_n[:, None] < length
        if PAIRS == "half":
            cols = (before(COLS, i) + tl.arange(0, COLS[i]))[None, :]
            mask = mask & (cols < D // 2)
            tl.store(rows + cols, cast(values[2 * i], dtype), mask=mask)
            tl.store(rows + (D // 2 + cols), cast(values[2 * i + 1], dtype), mask=mask)
        elif PAIRS == "interleaved":
            cols = (2 * before(COLS, i) + tl.arange(0, 2 * COLS[i]))[None, :]
            pairs = tl.join(values[2 * i], values[2 * i + 1])
            pairs = tl.reshape(pairs, (pairs.shape[0], tl.constexpr(2 * COLS[i])))
            tl.store(rows + cols, cast(pairs, dtype), mask=mask & (cols < D))
        else:
            cols = (before(COLS, i) + tl.arange(0, COLS[i]))[None, :]
            tl.store(rows + cols, cast(values[i], dtype), mask=mask & (cols < D))


@triton.jit
def columns(i, D: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr):
    """The columns of the head that part ``i`` holds, and which of them exist."""
    if PAIRS == "half":
        cols = before(COLS, i // 2) + tl.arange(0, COLS[i // 2])
        return cols + i % 2 * (D // 2), cols < D // 2
    elif PAIRS == "interleaved":
        cols = 2 * (before(COLS, i // 2) + tl.arange(0, COLS[i // 2])) + i % 2
        return cols, cols < D
    else:
        cols = before(COLS, i) + tl.arange(0, COLS[i])
        return cols, cols < D


@triton.jit
def standardized(raw, eps, D: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr):
    """float32 parts of mean 0 and variance 1 ("rms": of mean square 1), zero past the head dim, and their 1 / std."""
    total = tl.zeros((raw[0].shape[0],), tl.float32)
    if NORM == "layer":
        for i in tl.static_range(len(raw)):
            total += tl.sum(raw[i].to(tl.float32), 1)
    mean = total / D
    squares = tl.zeros((raw[0].shape[0],), tl.float32)
    centred = ()
    for i in tl.static_range(len(raw)):
        x = raw[i].to(tl.float32)
        if NORM == "layer":
            _, exist = columns(i, D, COLS, PAIRS)
            x = tl.where(exist[None, :], x - mean[:, None], 0.0)
        squares += tl.sum(x * x, 1)
        centred = centred + (x,)
    rstd = tl.rsqrt(squares / D + eps)
    parts = ()
    for i in tl.static_range(len(raw)):
        parts = parts + (centred[i] * rstd[:, None],)
    return parts, rstd


@triton.jit
def _angles(rope_ptr, offs_n, num_prefix, length, D: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr):
    """Sines and cosines of the tokens offs_n, in parts: 0 and 1 for the prefix."""
    rows = offs_n - num_prefix
    inside = (rows >= 0) & (offs_n < length)
    sin = load_heads(rope_ptr, rows, 2 * D, inside, 0.0, D, 1, COLS, PAIRS)
    cos = load_heads(rope_ptr + D, rows, 2 * D, inside, 1.0, D, 1, COLS, PAIRS)
    return sin, cos


@triton.jit
def prepared(
    raw, offs_n, length, weight_ptr, bias_ptr, eps, rope_ptr, num_prefix,
    D: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The parts ``raw`` of the tokens offs_n normalised and rotated in float32, rounded once."""
    if NORM == "" and PAIRS == "":
        return raw
    else:
        dtype: tl.constexpr = raw[0].dtype
        x = ()
        if NORM != "":
            normed, _ = standardized(raw, eps, D, COLS, PAIRS, NORM)
            for i in tl.static_range(len(raw)):
                y = normed[i]
                cols, exist = columns(i, D, COLS, PAIRS)
                if weight_ptr is not None:
                    y *= tl.load(weight_ptr + cols, mask=exist, other=0.0).to(tl.float32)[None, :]
                if bias_ptr is not None:
                    y += tl.load(bias_ptr + cols, mask=exist, other=0.0).to(tl.float32)[None, :]
                x = x + (y,)
        else:
            for i in tl.static_range(len(raw)):
                x = x + (raw[i].to(tl.float32),)
        if PAIRS != "":
            sin, cos = _angles(rope_ptr, offs_n, num_prefix, length, D, COLS, PAIRS)
            turned = ()
            for i in tl.static_range(0, len(raw), 2):
                turned = turned + (x[i] * cos[i] - x[i + 1] * sin[i],)
                turned = turned + (x[i + 1] * cos[i + 1] + x[i] * sin[i + 1],)
            x = turned
        parts = ()
        for i in tl.static_range(len(raw)):
            parts = parts + (cast(x[i], dtype),)
        return parts


@triton.jit
def load_prepared(
    ptr, offs_n, stride_n, length, weight_ptr, bias_ptr, eps, rope_ptr, num_prefix,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    raw = load_heads(ptr, offs_n, stride_n, offs_n < length, 0.0, D, UNIT, COLS, PAIRS)
    return prepared(raw, offs_n, length, weight_ptr, bias_ptr, eps, rope_ptr, num_prefix, D, COLS, PAIRS, NORM)


@triton.jit
def raw_gradient(
    grad, ptr, offs_n, stride_n, length, weight_ptr, eps, rope_ptr, num_prefix, partial_ptr,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of what ``prepared`` was given from that of its result, both float32 parts of the tokens offs_n.

    partial_ptr   this program's sums over its tokens (2, D), for the gradients of weight and bias
    """
    if PAIRS != "":
        sin, cos = _angles(rope_ptr, offs_n, num_prefix, length, D, COLS, PAIRS)
        turned = ()
        for i in tl.static_range(0, len(grad), 2):
            turned = turned + (grad[i] * cos[i] + grad[i + 1] * sin[i + 1],)
            turned = turned + (grad[i + 1] * cos[i + 1] - grad[i] * sin[i],)
        grad = turned
    if NORM != "":
        raw = load_heads(ptr, offs_n, stride_n, offs_n < length, 0.0, D, UNIT, COLS, PAIRS)
        normed, rstd = standardized(raw, eps, D, COLS, PAIRS, NORM)
        mean = tl.zeros((grad[0].shape[0],), tl.float32)
        slope = tl.zeros((grad[0].shape[0],), tl.float32)
        weighted = ()
        for i in tl.static_range(len(grad)):
            cols, exist = columns(i, D, COLS, PAIRS)
            tl.store(partial_ptr + cols, tl.sum(grad[i] * normed[i], 0), mask=exist)
            tl.store(partial_ptr + (D + cols), tl.sum(grad[i], 0), mask=exist)
            g = grad[i]
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + cols, mask=exist, other=0.0).to(tl.float32)[None, :]
            if NORM == "layer":
                mean += tl.sum(tl.where(exist[None, :], g, 0.0), 1)
            slope += tl.sum(g * normed[i], 1)
            weighted = weighted + (g,)
        result = ()
        for i in tl.static_range(len(grad)):
            result = result + ((weighted[i] - mean[:, None] / D - normed[i] * (slope[:, None] / D)) * rstd[:, None],)
        return result
    else:
        return grad
