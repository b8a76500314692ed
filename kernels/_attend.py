"""A block of queries against all keys of a head, which are held in tiles: two ways to the same sums."""

# ruff: noqa: RUF005 - Triton knows no (*parts, part)
from __future__ import annotations

import triton
import triton.language as tl

from ._softmax import LOG2_E, weights
from ._tiles import before, inner, outer, scaled, zeros


@triton.jit
def _tile_scores(q, k, j, Nk, KEYS: tl.constexpr):
    """q k^T of key tile ``j``. Only the last tile is ragged: padded keys must not enter the row maximum."""
    scores = inner(q, k[j])
    if j == len(KEYS) - 1:
        scores = tl.where((before(KEYS, j) + tl.arange(0, KEYS[j]))[None, :] < Nk, scores, float("-inf"))
    return scores


@triton.jit
def attend_at_once(q, k, v, Nk, scale, BLOCK_M: tl.constexpr, COLS: tl.constexpr, KEYS: tl.constexpr):
    """(unscaled output, row maximum, row sum) of all keys at once: the maximum is exact and nothing is rescaled."""
    scores = ()
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for j in tl.static_range(len(KEYS)):
        tile = _tile_scores(q, k, j, Nk, KEYS)
        row_max = tl.maximum(row_max, tl.max(tile, 1))
        scores = scores + (tile,)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zeros(BLOCK_M, COLS)
    for j in tl.static_range(len(KEYS)):
        p = weights(scores[j], row_max[:, None], scale, False)
        row_sum += tl.sum(p, 1)
        acc = outer(p, v[j], acc)
    return acc, row_max, row_sum


@triton.jit
def attend_by_tile(q, k, v, Nk, scale, BLOCK_M: tl.constexpr, COLS: tl.constexpr, KEYS: tl.constexpr):
    """The same with a running maximum: one tile of scores in registers, so more programs share a multiprocessor."""
    scores = _tile_scores(q, k, 0, Nk, KEYS)
    row_max = tl.max(scores, 1)
    p = weights(scores, row_max[:, None], scale, False)
    row_sum = tl.sum(p, 1)
    acc = outer(p, v[0], zeros(BLOCK_M, COLS))
    for j in tl.static_range(1, len(KEYS)):
        scores = _tile_scores(q, k, j, Nk, KEYS)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = weights(scores, new_max[:, None], scale, False)
        shrink = tl.exp2((row_max - new_max) * (scale * LOG2_E))
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = outer(p, v[j], scaled(acc, shrink[:, None]))
        row_max = new_max
    return acc, row_max, row_sum
