"""Patch embedding: image to tokens in one kernel, and its gradients.

The convolution is a GEMM of patches (B * L, K) and weights (K, E), K = C * PH * PW. Patches are never unfolded: each
tile gathers its pixels straight from the image, whatever its strides, and normalises them on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import PatchEmbedSettings, patch_embed_settings
from ._math import cast, dot

_MIN_ROWS_PER_SPLIT = 512  # shorter reductions cost more in partial sums than they gain
_SUM_BLOCKS = {"BLOCK_B": 32, "BLOCK_N": 256}


def patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """Tokens of images; one launch.

    images     (B, C, IH, IW)            uint8 | float32 | dtype of weight, any strides; sides are multiples of PH, PW
    weight     (E, C, PH, PW)            float16 | bfloat16 | float32
    bias       (E,)                      optional
    pos_embed  (L, E) | (T + L, E)       optional
    prefix     (T, E)                    optional
    mean, std  (C,)                      optional, float32, in units of [0, 1] pixels
    returns    (B, T + L, E)             dtype of weight, contiguous
    """
    view = _PatchView.of(images, weight)
    num_prefix = 0 if prefix is None else prefix.shape[0]
    num_tokens = num_prefix + view.num_patches
    dim = weight.shape[0]
    tokens = torch.empty(images.shape[0], num_tokens, dim, dtype=weight.dtype, device=images.device)
    num_rows = images.shape[0] * num_tokens
    if num_rows == 0:
        return tokens
    settings = _settings(weight, num_rows, dim, images.itemsize, weight.itemsize)
    with torch.cuda.device_of(images):
        _patch_embed_fwd_kernel[(settings.tiles(num_rows, dim),)](
            images, view.matrix(weight), *(_contiguous(t) for t in (bias, pos_embed, prefix, mean, std)), tokens,
            num_rows, num_tokens, num_prefix, *view.arguments(),
            POS_ON_PREFIX=pos_embed is not None and pos_embed.shape[0] == num_tokens,
            E=dim, **view.constexprs(images), **settings.constexprs(), **settings.options(),
        )  # fmt: skip
    return tokens


def patch_embed_bwd(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    num_prefix: int,
    mean: Tensor | None,
    std: Tensor | None,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of patch_embed_fwd; deterministic, without atomics.

    dout        (B, T + L, E)    dtype of weight
    mask        which of the three results are wanted
    dimages     (B, C, IH, IW)   dtype of images (float only)
    dweight     (E, C, PH, PW)   dtype of weight
    token_sum   (T + L, E)       float32: dout summed over the batch. dpos_embed and dprefix are its rows, dbias is the
                                 sum of its patch rows
    """
    dout = dout.contiguous()
    with torch.cuda.device_of(images):
        dimages = _image_gradient(dout, images, weight, num_prefix, std) if mask[0] else None
        dweight = _weight_gradient(dout, images, weight, num_prefix, mean, std) if mask[1] else None
        token_sum = _sum_leading(dout, torch.empty_like(dout[0], dtype=torch.float32)) if mask[2] else None
    return dimages, dweight, token_sum


def _image_gradient(dout: Tensor, images: Tensor, weight: Tensor, num_prefix: int, std: Tensor | None) -> Tensor:
    """dout @ weight, each row put back on its patch: patches tile the image, so every pixel is written once."""
    dimages = torch.empty_like(images)
    view = _PatchView.of(dimages, weight)
    num_rows = images.shape[0] * view.num_patches
    if num_rows == 0:
        return dimages
    settings = _settings(weight, num_rows, view.size, dout.itemsize, weight.itemsize)
    _patch_embed_dimages_kernel[(settings.tiles(num_rows, view.size),)](
        dout, view.matrix(weight), _contiguous(std), dimages,
        num_rows, dout.shape[1], num_prefix, *view.arguments(),
        E=weight.shape[0], **view.constexprs(dimages), **settings.constexprs(), **settings.options(),
    )  # fmt: skip
    return dimages


def _weight_gradient(
    dout: Tensor, images: Tensor, weight: Tensor, num_prefix: int, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    """dout^T @ patches in two stages: each split sums its own rows in float32, then the splits are added in order."""
    view = _PatchView.of(images, weight)
    dweight = torch.empty_like(weight)
    num_rows = images.shape[0] * view.num_patches
    if num_rows == 0:
        return dweight.zero_()
    dim = weight.shape[0]
    settings = _settings(
        weight, dim, view.size, dout.itemsize, images.itemsize, triton.cdiv(num_rows, _MIN_ROWS_PER_SPLIT)
    )
    rows_per_split = triton.cdiv(triton.cdiv(num_rows, settings.splits), settings.block_k) * settings.block_k
    partial = torch.empty(settings.splits, dim, view.size, dtype=torch.float32, device=images.device)
    _patch_embed_dweight_kernel[(settings.tiles(dim, view.size), settings.splits)](
        dout, images, _contiguous(mean), _contiguous(std), partial,
        num_rows, rows_per_split, dout.shape[1], num_prefix, view.num_patches, *view.arguments(),
        E=dim, **view.constexprs(images), **settings.constexprs(), **settings.options(),
    )  # fmt: skip
    target = view.permute(dweight)
    if target.is_contiguous():
        _sum_leading(partial, target)
        return dweight
    target.copy_(_sum_leading(partial, torch.empty(target.shape, dtype=weight.dtype, device=images.device)))
    return dweight


def _sum_leading(x: Tensor, out: Tensor) -> Tensor:
    """Sum contiguous ``x`` over its first axis into contiguous ``out``, in float32 and in a fixed order."""
    size = out.numel()
    if size == 0 or x.shape[0] == 0:
        return out.zero_()
    _sum_leading_kernel[(triton.cdiv(size, _SUM_BLOCKS["BLOCK_N"]),)](x, out, x.shape[0], size, **_SUM_BLOCKS)
    return out


def _settings(weight: Tensor, rows: int, cols: int, bytes_a: int, bytes_b: int, splits: int = 1) -> PatchEmbedSettings:
    processors, shared = _device_limits(weight.device)
    return patch_embed_settings(
        weight.dtype, rows, cols, operand_bytes=(bytes_a, bytes_b), processors=processors, shared=shared, splits=splits
    )


@cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory a block may use; an H200's under the interpreter."""
    if device.type != "cuda":
        return 132, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@dataclass(frozen=True)
class _PatchView:
    """How the K values of a patch lie in the image: three nested loops, the innermost along memory where there is one.

    NCHW          (C, PH, PW)
    channels last (1, PH, PW * C) when the pixels of a row are dense, else (PH, PW, C)
    """

    dims: tuple[int, int, int]
    strides: tuple[int, int, int]  # of dims, in elements
    patch_strides: tuple[int, int, int]  # image, patch row, patch column
    grid_w: int
    num_patches: int
    channels: int
    channels_last: bool

    @classmethod
    def of(cls, images: Tensor, weight: Tensor) -> _PatchView:
        (_, channels, height, width), (patch_h, patch_w) = images.shape, weight.shape[-2:]
        stride_b, stride_c, stride_h, stride_w = images.stride()
        channels_last = channels > 1 and stride_c == 1 and stride_w != 1
        if not channels_last:
            dims, strides = (channels, patch_h, patch_w), (stride_c, stride_h, stride_w)
        elif stride_w == channels:
            dims, strides = (1, patch_h, patch_w * channels), (0, stride_h, 1)
        else:
            dims, strides = (patch_h, patch_w, channels), (stride_h, stride_w, 1)
        grid_h, grid_w = height // patch_h, width // patch_w
        patch_strides = (stride_b, patch_h * stride_h, patch_w * stride_w)
        return cls(dims, strides, patch_strides, grid_w, grid_h * grid_w, channels, channels_last)

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    def permute(self, weight: Tensor) -> Tensor:
        """View of (E, C, PH, PW) in the order of K."""
        return weight.permute(0, 2, 3, 1) if self.channels_last else weight

    def matrix(self, weight: Tensor) -> Tensor:
        """(E, K) in the order of K; a copy only where the layouts of images and weight differ."""
        return self.permute(weight).reshape(weight.shape[0], self.size)

    def arguments(self) -> tuple[int, ...]:
        return (self.grid_w, *self.patch_strides, *self.strides)

    def constexprs(self, images: Tensor) -> dict[str, int]:
        # elements a thread may move at once: every run of pixels starts at a multiple of VEC from the first
        vec = math.gcd(16, self.dims[2], *self.patch_strides, *self.strides[:2]) if self.strides[2] == 1 else 1
        return {
            "K": self.size,
            "DIM_1": self.dims[1],
            "DIM_2": self.dims[2],
            "C": self.channels,
            "CHANNEL_RUN": 1 if self.channels_last else self.dims[1] * self.dims[2],
            "UNIT": 255 if images.dtype == torch.uint8 else 1,
            "VEC": vec,
        }


# Sizes and strides change with the batch and the image size: none of them may cause a new compilation.
_SIZES = [
    "num_rows", "rows_per_split", "num_tokens", "num_prefix", "num_patches", "grid_w",
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
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(k < K)[None, :], other=0)


@triton.jit(do_not_specialize=_SIZES)
def _patch_embed_fwd_kernel(
    images_ptr, weight_ptr, bias_ptr, pos_ptr, prefix_ptr, mean_ptr, std_ptr, tokens_ptr,
    num_rows, num_tokens, num_prefix, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
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
def _patch_embed_dimages_kernel(
    dout_ptr, weight_ptr, std_ptr, dimages_ptr,
    num_rows, num_tokens, num_prefix, grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
    E: tl.constexpr, K: tl.constexpr, DIM_1: tl.constexpr, DIM_2: tl.constexpr,
    C: tl.constexpr, CHANNEL_RUN: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, num_rows - 1)
    num_patches = num_tokens - num_prefix
    batch = safe_rows // num_patches
    patch = safe_rows - batch * num_patches
    dout_rows = (batch * num_tokens + num_prefix + patch).to(tl.int64) * E
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
def _patch_embed_dweight_kernel(
    dout_ptr, images_ptr, mean_ptr, std_ptr, partial_ptr,
    num_rows, rows_per_split, num_tokens, num_prefix, num_patches,
    grid_w, stride_b, stride_i, stride_j, stride_0, stride_1, stride_2,
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
        dout_rows = (batch * num_tokens + num_prefix + patch).to(tl.int64) * E
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
def _sum_leading_kernel(x_ptr, out_ptr, count, size, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = sum over b of x[b, n]. BLOCK_B rows are in flight at once; they are folded at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for b0 in range(0, count, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        mask = (b < count)[:, None] & (n < size)[None, :]
        acc += tl.load(x_ptr + b.to(tl.int64)[:, None] * size + n[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + n, cast(tl.sum(acc, axis=0), out_ptr.dtype.element_ty), mask=n < size)
