"""Device code of the patch embedding.

K, the values of a patch, is three nested loops over the image: k = (k0 * DIM_1 + k1) * DIM_2 + k2 lies at
k0 * stride_0 + k1 * stride_1 + k2 * stride_2 from the patch's first pixel (see patch_embed.PatchView).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import cast, dot

# Sizes and strides change with the batch and the image size: none of them may cause a new compilation.
_SIZES = [
    "num_rows", "rows_per_split", "num_prefix", "num_patches", "grid_w",
    "stride_b", "stride_i", "stride_j", "stride_0", "stride_1", "stride_2",
]  # fmt: skip


@triton.jit
def _patch_start(batch, patch, grid_w, stride_b, stride_i, stride_j):
    """Offset of a patch's first pixel."""
    i = patch // grid_w
    j = patch - i * grid_w
    return batch.to(tl.int64) * stride_b + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j


@triton.jit
def _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1: tl.constexpr, DIM_2: tl.constexpr, VEC: tl.constexpr):
    """(rows, K block) offsets of the pixels k of the patches that begin at start."""
    k = k.to(tl.int64)
    inner = k // (DIM_1 * DIM_2) * stride_0 + k // DIM_2 % DIM_1 * stride_1 + k % DIM_2 * stride_2
    offsets = start[:, None] + inner[None, :]
    if VEC > 1:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, VEC)), (1, VEC))
    return offsets


@triton.jit
def _normalisation(k, mean_ptr, std_ptr, C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr):
    """(1, K block) scale and shift: (pixel / UNIT - mean) / std = pixel * scale + shift."""
    channel = k // CHANNEL_RUN % C
    scale = tl.full(channel.shape, 1.0 / UNIT, tl.float32)
    shift = tl.zeros(channel.shape, tl.float32)
    if std_ptr is not None:
        inverse = 1.0 / tl.load(std_ptr + channel)
        scale *= inverse
    if mean_ptr is not None:
        shift -= tl.load(mean_ptr + channel)
        if std_ptr is not None:
            shift *= inverse
    return scale[None, :], shift[None, :]


@triton.jit
def _load_k_tail(ptrs, k, K: tl.constexpr, BLOCK: tl.constexpr):
    """Load (rows, K block); the ragged end of K is zero."""
    if K % BLOCK == 0:
        values = tl.load(ptrs)
    else:
        values = tl.load(ptrs, mask=(k < K)[None, :], other=0)
    return values


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_fwd_kernel(
    images_ptr, weight_ptr, bias_ptr, pos_ptr, prefix_ptr, mean_ptr, std_ptr, tokens_ptr,
    num_rows, num_prefix, num_patches, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    POS_ON_PREFIX: tl.constexpr, E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # programs that share image rows run side by side: the pixels come from memory once, the rest from L2
    num_n: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    # rows are all tokens, prefix included: its rows (1 in 197) waste their products and are replaced at the end
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_rows - 1)
    num_tokens = num_prefix + num_patches
    batch = safe_rows // num_tokens
    token = safe_rows - batch * num_tokens
    start = _patch_start(batch, tl.maximum(token - num_prefix, 0), grid_w, stride_b, stride_i, stride_j)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_cols = tl.minimum(cols, E - 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        pixels = _load_k_tail(
            images_ptr + _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1, DIM_2, VEC), k, K, BLOCK_K
        )
        if UNIT != 1 or mean_ptr is not None or std_ptr is not None:
            scale, shift = _normalisation(k, mean_ptr, std_ptr, C, CHANNEL_RUN, UNIT)
            pixels = pixels.to(tl.float32) * scale + shift
        weight = _load_k_tail(weight_ptr + safe_cols[:, None] * K + k[None, :], k, K, BLOCK_K)
        acc = dot(cast(pixels, weight.dtype), tl.trans(weight), acc)

    in_cols = (cols < E)[None, :]
    is_prefix = (token < num_prefix)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_cols).to(tl.float32)[None, :]
    if prefix_ptr is not None:
        prefix = tl.load(prefix_ptr + token[:, None] * E + cols[None, :], mask=is_prefix & in_cols, other=0)
        acc = tl.where(is_prefix, prefix.to(tl.float32), acc)
    if pos_ptr is not None:
        if POS_ON_PREFIX:
            pos = tl.load(pos_ptr + token[:, None] * E + cols[None, :], mask=in_cols, other=0)
        else:
            pos_row = token - num_prefix
            pos = tl.load(pos_ptr + pos_row[:, None] * E + cols[None, :], mask=in_cols & ~is_prefix, other=0)
        acc += pos.to(tl.float32)
    tokens_ptrs = tokens_ptr + rows.to(tl.int64)[:, None] * E + cols[None, :]
    tl.store(tokens_ptrs, cast(acc, tokens_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & in_cols)


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_dimages_kernel(
    dout_ptr, weight_ptr, std_ptr, dimages_ptr,
    num_rows, num_prefix, num_patches, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_rows - 1)
    batch = safe_rows // num_patches
    patch = safe_rows - batch * num_patches
    dout_rows = (safe_rows + (batch + 1) * num_prefix).to(tl.int64) * E
    k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for e0 in range(0, E, BLOCK_K):
        e = e0 + tl.arange(0, BLOCK_K)
        dout = _load_k_tail(dout_ptr + dout_rows[:, None] + e[None, :], e, E, BLOCK_K)
        # past E the rows of weight are clamped: the zeros of dout remove them
        weight = _load_k_tail(weight_ptr + tl.minimum(e, E - 1)[:, None] * K + k[None, :], k, K, BLOCK_N)
        acc = dot(dout, weight, acc)

    if std_ptr is not None:
        acc /= tl.load(std_ptr + k // CHANNEL_RUN % C)[None, :]
    start = _patch_start(batch, patch, grid_w, stride_b, stride_i, stride_j)
    offsets = _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1, DIM_2, VEC)
    mask = (rows < num_rows)[:, None]
    if K % BLOCK_N != 0:
        mask = mask & (k < K)[None, :]
    tl.store(dimages_ptr + offsets, cast(acc, dimages_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _divide_small(n, d):
    """n // d without the long integer division; exact below 2^22."""
    return ((n.to(tl.float32) + 0.5) * (1.0 / d)).to(tl.int32)


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_dweight_kernel(
    dout_ptr, images_ptr, mean_ptr, std_ptr, partial_ptr,
    num_rows, rows_per_split, num_prefix, num_patches, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    e = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    if UNIT != 1 or mean_ptr is not None or std_ptr is not None:
        scale, shift = _normalisation(k, mean_ptr, std_ptr, C, CHANNEL_RUN, UNIT)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first, last, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        safe_rows = tl.minimum(rows, last - 1)
        batch = safe_rows // num_patches
        patch = safe_rows - batch * num_patches
        dout_rows = (safe_rows + (batch + 1) * num_prefix).to(tl.int64) * E
        in_e = (rows < last)[:, None] & (e < E)[None, :]
        dout = tl.load(dout_ptr + dout_rows[:, None] + e[None, :], mask=in_e, other=0)
        start = _patch_start(batch, patch, grid_w, stride_b, stride_i, stride_j)
        offsets = _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1, DIM_2, VEC)
        # past the last row the pixels repeat: the zeros of dout remove them
        pixels = _load_k_tail(images_ptr + offsets, k, K, BLOCK_N)
        if UNIT != 1 or mean_ptr is not None or std_ptr is not None:
            pixels = pixels.to(tl.float32) * scale + shift
        acc = dot(tl.trans(dout), cast(pixels, dout.dtype), acc)

    partial_rows = (split * E + e).to(tl.int64) * K
    mask = (e < E)[:, None] & (k < K)[None, :]
    tl.store(partial_ptr + partial_rows[:, None] + k[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["count", "size"])
def sum_leading_kernel(x_ptr, out_ptr, count, size, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = sum over b of x[b, n]. BLOCK_B rows are in flight at once; they are folded at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for b0 in range(0, count, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        mask = (b < count)[:, None] & (n < size)[None, :]
        acc += tl.load(x_ptr + b.to(tl.int64)[:, None] * size + n[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + n, cast(tl.sum(acc, axis=0), out_ptr.dtype.element_ty), mask=n < size)
