"""Device code of the patch embedding.

K, the values of a patch, is three nested loops over the image: k = (k0 * DIM_1 + k1) * DIM_2 + k2 lies at
k0 * stride_0 + k1 * stride_1 + k2 * stride_2 from the patch's first pixel (see patch_embed.PatchView).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import add_dot, cast

# Sizes and strides change with the batch and the image size: none of them may cause a new compilation.
_SIZES = [
    "num_rows", "rows_per_split", "num_prefix", "num_patches", "grid_w",
    "stride_b", "stride_i", "stride_j", "stride_0", "stride_1", "stride_2",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_fwd_kernel(
    images_ptr, weight_ptr, bias_ptr, pos_ptr, prefix_ptr, mean_ptr, std_ptr, tokens_ptr,
    num_rows, num_prefix, num_patches, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    POS_ON_PREFIX: tl.constexpr, E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # programs that share image rows run side by side: the pixels come from memory once, then from L2
    num_n: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    rows = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(0) % num_n * BLOCK_N
    # past the ends the last row and column repeat; they are not stored
    weight_rows = weight_ptr + tl.minimum(first_col + tl.arange(0, BLOCK_N), E - 1)[:, None] * K
    safe_rows = tl.minimum(rows, num_rows - 1)
    batch = safe_rows // num_patches
    patch = safe_rows - batch * num_patches
    start = _patch_start(batch, patch, grid_w, stride_b, stride_i, stride_j)
    scales, shifts = _normalisation(mean_ptr, std_ptr, C, UNIT)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        offsets = _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1, DIM_2, VEC)
        pixels = _load_columns(images_ptr + offsets, k, K, BLOCK_K)
        if UNIT != 1 or mean_ptr is not None or std_ptr is not None:
            # one channel for the whole block where the block divides it
            channel = k0 // CHANNEL_RUN if CHANNEL_RUN % BLOCK_K == 0 else (k // CHANNEL_RUN % C)[None, :]
            pixels = _as_float(pixels) * _select(scales, channel, C) + _select(shifts, channel, C)
        weight = _load_columns(weight_rows + k[None, :], k, K, BLOCK_K)
        acc = add_dot(cast(pixels, weight.dtype), tl.trans(weight), acc)

    token_rows = tokens_ptr + (rows + batch * num_prefix).to(tl.int64)[:, None] * E
    in_rows = (rows < num_rows)[:, None]
    # in pieces: the position rows of all columns would not fit the registers beside the sums
    WIDTH: tl.constexpr = min(BLOCK_N, 64)
    pieces = _pieces(acc, WIDTH)
    for piece in tl.static_range(BLOCK_N // WIDTH):
        sums = pieces[piece]
        cols = first_col + piece * WIDTH + tl.arange(0, WIDTH)
        in_cols = cols < E
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + cols, mask=in_cols, other=0).to(tl.float32)[None, :]
        if pos_ptr is not None:
            pos_rows = patch + num_prefix if POS_ON_PREFIX else patch
            pos = tl.load(pos_ptr + pos_rows[:, None] * E + cols[None, :], mask=in_cols[None, :], other=0)
            sums += pos.to(tl.float32)
        ptrs = token_rows + cols[None, :]
        mask = in_rows & in_cols[None, :]
        tl.store(ptrs + num_prefix * E, cast(sums, tokens_ptr.dtype.element_ty), mask=mask)
        if prefix_ptr is not None:
            # who holds an image's first patch also writes the rows before it
            for t in range(num_prefix):
                row = tl.load(prefix_ptr + t * E + cols, mask=in_cols, other=0).to(tl.float32)
                if POS_ON_PREFIX:
                    row += tl.load(pos_ptr + t * E + cols, mask=in_cols, other=0).to(tl.float32)
                row = tl.broadcast_to(cast(row, tokens_ptr.dtype.element_ty)[None, :], (BLOCK_M, WIDTH))
                tl.store(ptrs + t * E, row, mask=mask & (patch == 0)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_dimages_kernel(
    dout_ptr, weight_ptr, std_ptr, dimages_ptr,
    num_rows, num_prefix, num_patches, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    rows = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, num_rows - 1)
    batch = safe_rows // num_patches
    patch = safe_rows - batch * num_patches
    dout_ptr += (safe_rows + (batch + 1) * num_prefix).to(tl.int64)[:, None] * E

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for e0 in range(0, E, BLOCK_K):
        e = e0 + tl.arange(0, BLOCK_K)
        dout = _load_columns(dout_ptr + e[None, :], e, E, BLOCK_K)
        # past E the last row of weight repeats: the zeros of dout remove it
        weight = _load_columns(weight_ptr + tl.minimum(e, E - 1)[:, None] * K + k[None, :], k, K, BLOCK_N)
        acc = add_dot(cast(dout, weight.dtype), weight, acc)

    scales, _ = _normalisation(None, std_ptr, C, UNIT)
    acc *= _select(scales, (k // CHANNEL_RUN % C)[None, :], C)
    start = _patch_start(batch, patch, grid_w, stride_b, stride_i, stride_j)
    offsets = _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1, DIM_2, VEC)
    mask = (rows < num_rows)[:, None] & (k < K)[None, :]
    tl.store(dimages_ptr + offsets, cast(acc, dimages_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_dweight_kernel(
    dout_ptr, images_ptr, mean_ptr, std_ptr, partial_ptr,
    num_rows, rows_per_split, num_prefix,
    num_patches, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    COMPUTE: tl.constexpr, E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    e = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first_row = split * rows_per_split
    count = tl.minimum(rows_per_split, num_rows - first_row)
    first_batch = first_row // num_patches
    first_patch = first_row - first_batch * num_patches
    dout_ptr += (first_row + (first_batch + 1) * num_prefix).to(tl.int64) * E
    scales, shifts = _normalisation(mean_ptr, std_ptr, C, UNIT)
    channel = (k // CHANNEL_RUN % C)[None, :]
    scale, shift = _select(scales, channel, C), _select(shifts, channel, C)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(0, count, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        # past the last row the pixels repeat: the zeros of dout remove them
        safe_rows = tl.minimum(rows, count - 1)
        batch = _divide(first_patch + safe_rows, num_patches)
        patch = first_patch + safe_rows - batch * num_patches
        dout_rows = (safe_rows + batch * num_prefix).to(tl.int64)[:, None] * E
        dout = tl.load(dout_ptr + dout_rows + e[None, :], mask=(rows < count)[:, None] & (e < E)[None, :], other=0)
        start = _patch_start(first_batch + batch, patch, grid_w, stride_b, stride_i, stride_j)
        offsets = _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1, DIM_2, VEC)
        pixels = _load_columns(images_ptr + offsets, k, K, BLOCK_N)
        if UNIT != 1 or mean_ptr is not None or std_ptr is not None:
            pixels = _as_float(pixels) * scale + shift
        acc = add_dot(tl.trans(cast(dout, COMPUTE)), cast(pixels, COMPUTE), acc)

    partial_ptr += split.to(tl.int64) * E * K
    tl.store(partial_ptr + e[:, None] * K + k[None, :], acc, mask=(e < E)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["count"])
def sum_leading_kernel(x_ptr, out_ptr, count, size, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = sum over b of x[b, n]. BLOCK_B rows are in flight at once; they are folded at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for b0 in range(0, count, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        mask = (b < count)[:, None] & (n < size)[None, :]
        acc += tl.load(x_ptr + b.to(tl.int64)[:, None] * size + n[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + n, cast(tl.sum(acc, axis=0), out_ptr.dtype.element_ty), mask=n < size)


@triton.jit
def _divide(n, d):
    """n // d in three instructions; exact below 2^20, which bounds the patches of an image and the rows of a split."""
    return ((n.to(tl.float32) + 0.5) * (1.0 / d)).to(tl.int32)


@triton.jit
def _patch_start(batch, patch, grid_w, stride_b, stride_i, stride_j):
    """Offset of a patch's first pixel."""
    i = _divide(patch, grid_w)
    j = patch - i * grid_w
    return batch.to(tl.int64) * stride_b + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j


@triton.jit
def _pixel_offsets(start, k, stride_0, stride_1, stride_2, DIM_1: tl.constexpr, DIM_2: tl.constexpr, VEC: tl.constexpr):
    """(rows, K block) offsets of the pixels k of the patches that begin at start."""
    k0, k1, k2 = k // (DIM_1 * DIM_2), k // DIM_2 % DIM_1, k % DIM_2
    inner = k0.to(tl.int64) * stride_0 + k1.to(tl.int64) * stride_1 + k2.to(tl.int64) * stride_2
    offsets = start[:, None] + inner[None, :]
    if VEC > 1:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, VEC)), (1, VEC))
    return offsets


@triton.jit
def _load_columns(ptrs, k, K: tl.constexpr, BLOCK: tl.constexpr):
    """Load (rows, BLOCK); columns past K are zero."""
    if K % BLOCK == 0:
        values = tl.load(ptrs)
    else:
        values = tl.load(ptrs, mask=(k < K)[None, :], other=0)
    return values


@triton.jit
def _normalisation(mean_ptr, std_ptr, C: tl.constexpr, UNIT: tl.constexpr):
    """Scale and shift of every channel: (pixel / UNIT - mean) / std = pixel * scale + shift."""
    scales = ()
    shifts = ()
    for c in tl.static_range(C):
        inverse = 1.0 / tl.load(std_ptr + c) if std_ptr is not None else 1.0
        scales += (inverse / UNIT,)
        shifts += (-tl.load(mean_ptr + c) * inverse if mean_ptr is not None else 0.0,)
    return scales, shifts


@triton.jit
def _pieces(x, WIDTH: tl.constexpr):
    """Cut a tile into a tuple of tiles WIDTH columns wide, by halving."""
    pieces = (x,)
    if x.shape[1] > WIDTH:
        half: tl.constexpr = x.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, half)), (0, 2, 1)))
        pieces = _pieces(left, WIDTH) + _pieces(right, WIDTH)
    return pieces


@triton.jit
def _as_float(pixels):
    """Pixels in float32. Triton 3.6 gives an IEEE dot whose operand was widened from bytes to the TF32 units of sm_100;
    it does not look through a sum, and a sum of one value is free."""
    if pixels.dtype == tl.uint8:
        return tl.sum(pixels.to(tl.float32)[:, :, None], axis=2)
    else:
        return pixels.to(tl.float32)


@triton.jit
def _select(values, index, COUNT: tl.constexpr):
    """values[index] for a tuple of scalars and a tensor of indices."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(index == i, values[i], value)
    return value
