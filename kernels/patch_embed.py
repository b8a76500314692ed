"""Patch embedding: image to tokens in one kernel, and its gradients.

The convolution is a GEMM of patches (B * L, K) and weights (K, E), K = C * PH * PW. Patches are never unfolded: each
tile gathers its pixels straight from the image, whatever its strides, and normalises them on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import PATCH_EMBED_SUM, AotCase, Limits, patch_embed_settings
from ._launch import Launch, limits, run_on
from ._patch_embed import (
    patch_embed_dimages_kernel,
    patch_embed_dweight_kernel,
    patch_embed_fwd_kernel,
    sum_leading_kernel,
)

_MIN_ROWS_PER_SPLIT = 512  # shorter reductions cost more in partial sums than they gain
_MAX_ROWS_PER_SPLIT = 2**19  # the kernel divides row numbers in float32


def patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Tokens of images; one launch.

    images     (B, C, IH, IW)            uint8 | float32 | dtype of weight, any strides; sides are multiples of PH, PW
    weight     (E, C, PH, PW)            float16 | bfloat16 | float32
    bias       (E,)                      optional, like the next two in dtype of weight or float32
    pos_embed  (L, E) | (T + L, E)       optional
    prefix     (T, E)                    optional
    mean, std  (C,)                      optional, float32, in units of [0, 1] pixels
    dtype                                of the tokens: float32 or, as by default, that of weight
    returns    (B, T + L, E)             contiguous
    """
    view = PatchView.of(images, weight)
    num_tokens = view.num_patches + (0 if prefix is None else prefix.shape[0])
    tokens = weight.new_empty((images.shape[0], num_tokens, weight.shape[0]), dtype=dtype)
    if tokens.numel() > 0:
        bias, pos_embed, prefix, mean, std = (
            None if t is None else t.contiguous() for t in (bias, pos_embed, prefix, mean, std)
        )
        matrix = view.matrix(weight)
        tensors = {"images": images, "weight": matrix, "bias": bias, "pos": pos_embed, "prefix": prefix}
        tensors |= {"mean": mean, "std": std, "tokens": tokens}
        arguments = (view, images, matrix, bias, pos_embed, prefix, mean, std, tokens, limits(images.device))
        run_on(tensors, ("patch_embed_fwd", weight.shape), lambda: [_forward(*arguments)])
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

    dout        (B, T + L, E)    dtype of weight or float32
    mask        which of the three results are wanted
    dimages     (B, C, IH, IW)   dtype of images (float only)
    dweight     (E, C, PH, PW)   dtype of weight
    token_sum   (T + L, E)       float32: dout summed over the batch. dpos_embed and dprefix are its rows, dbias is the
                                 sum of its patch rows
    """
    dout = dout.contiguous()
    dimages = _image_gradient(dout, images, weight, num_prefix, std) if mask[0] else None
    dweight = _weight_gradient(dout, images, weight, num_prefix, mean, std) if mask[1] else None
    token_sum = _sum_leading(dout, dout.new_empty(dout.shape[1:], dtype=torch.float32)) if mask[2] else None
    return dimages, dweight, token_sum


def _image_gradient(dout: Tensor, images: Tensor, weight: Tensor, num_prefix: int, std: Tensor | None) -> Tensor:
    dimages = torch.empty_like(images)
    view = PatchView.of(dimages, weight)
    if dimages.numel() > 0:
        _dimages(view, dout, weight, num_prefix, std, dimages, limits(images.device)).run()
    return dimages


def _weight_gradient(
    dout: Tensor, images: Tensor, weight: Tensor, num_prefix: int, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    """Two stages: each split sums the products of its own rows in float32, then the splits are added in order."""
    view = PatchView.of(images, weight)
    dweight = torch.empty_like(weight)
    if dout.numel() == 0:
        return dweight.zero_()
    launch, partial = _dweight(view, dout, images, weight, num_prefix, mean, std, limits(images.device))
    launch.run()
    target = view.permute(dweight)
    if target.is_contiguous():
        _sum_leading(partial, target)
    else:
        target.copy_(_sum_leading(partial, weight.new_empty(target.shape)))
    return dweight


def _sum_leading(x: Tensor, out: Tensor) -> Tensor:
    """Sum contiguous ``x`` over its first axis into contiguous ``out``, in float32 and in a fixed order."""
    if x.numel() == 0:
        return out.zero_()
    _sum(x, out).run()
    return out


def _forward(
    view: PatchView,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    tokens: Tensor,
    device: Limits,
) -> Launch:
    """``weight`` is ``view.matrix``; all but ``images`` is contiguous."""
    batch, num_tokens, dim = tokens.shape
    num_rows = batch * view.num_patches
    settings = patch_embed_settings("fwd", weight.dtype, num_rows, dim, (images.itemsize, weight.itemsize), device)
    optional = (bias, pos_embed, prefix, mean, std)
    arguments = (images, weight, *optional, tokens, num_rows, num_tokens - view.num_patches)
    pos_on_prefix = pos_embed is not None and pos_embed.shape[0] == num_tokens
    constexprs = {"POS_ON_PREFIX": pos_on_prefix, "E": dim, **view.constexprs(images.dtype)}
    grid = (settings.tiles(num_rows, dim),)
    return Launch.of(patch_embed_fwd_kernel, grid, arguments + view.sizes(), constexprs, settings)


def _dimages(
    view: PatchView,
    dout: Tensor,
    weight: Tensor,
    num_prefix: int,
    std: Tensor | None,
    dimages: Tensor,
    device: Limits,
) -> Launch:
    num_rows = dimages.shape[0] * view.num_patches
    settings = patch_embed_settings(
        "dimages", weight.dtype, num_rows, view.size, (dout.itemsize, weight.itemsize), device
    )
    std = None if std is None else std.contiguous()
    arguments = (dout, view.matrix(weight), std, dimages, num_rows, num_prefix)
    constexprs = {"E": weight.shape[0], **view.constexprs(dimages.dtype)}
    grid = (settings.tiles(num_rows, view.size),)
    return Launch.of(patch_embed_dimages_kernel, grid, arguments + view.sizes(), constexprs, settings)


def _dweight(
    view: PatchView,
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    num_prefix: int,
    mean: Tensor | None,
    std: Tensor | None,
    device: Limits,
) -> tuple[Launch, Tensor]:
    """The launch, and the (splits, E, K) float32 sums it writes."""
    dim, num_rows = weight.shape[0], images.shape[0] * view.num_patches
    max_splits = triton.cdiv(num_rows, _MIN_ROWS_PER_SPLIT)
    operand_bytes = (dout.itemsize, images.itemsize)
    settings = patch_embed_settings("dweight", weight.dtype, dim, view.size, operand_bytes, device, max_splits)
    splits = max(settings.splits, triton.cdiv(num_rows, _MAX_ROWS_PER_SPLIT))
    rows_per_split = triton.cdiv(triton.cdiv(num_rows, splits), settings.block_k) * settings.block_k
    partial = dout.new_empty((splits, dim, view.size), dtype=torch.float32)
    mean, std = (None if t is None else t.contiguous() for t in (mean, std))
    arguments = (dout, images, mean, std, partial, num_rows, rows_per_split, num_prefix)
    compute = getattr(tl, str(weight.dtype).removeprefix("torch."))
    constexprs = {"COMPUTE": compute, "E": dim, **view.constexprs(images.dtype)}
    grid = (settings.tiles(dim, view.size), splits)
    return Launch.of(patch_embed_dweight_kernel, grid, arguments + view.sizes(), constexprs, settings), partial


def _sum(x: Tensor, out: Tensor) -> Launch:
    settings = PATCH_EMBED_SUM
    grid = (triton.cdiv(out.numel(), settings.block_n),)
    return Launch.of(sum_leading_kernel, grid, (x, out, x.shape[0], out.numel()), {}, settings)


@dataclass(frozen=True)
class PatchView:
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
    def of(cls, images: Tensor, weight: Tensor) -> PatchView:
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

    def sizes(self) -> tuple[int, ...]:
        return (self.num_patches, self.grid_w, *self.patch_strides, *self.strides)

    def constexprs(self, pixel: torch.dtype) -> dict[str, int]:
        # elements a thread may move at once: every run of pixels starts at a multiple of VEC from the first
        vec = math.gcd(16, self.dims[2], *self.patch_strides, *self.strides[:2]) if self.strides[2] == 1 else 1
        return {
            "K": self.size,
            "DIM_1": self.dims[1],
            "DIM_2": self.dims[2],
            "C": self.channels,
            "CHANNEL_RUN": 1 if self.channels_last else self.dims[1] * self.dims[2],
            "UNIT": 255 if pixel == torch.uint8 else 1,
            "VEC": vec,
        }


# (name, batch, pixels, patch side, image side, channels last); pixels None: dtype of weight
_AOT_SHAPES = (
    ("large", 256, None, 16, 224, False),
    ("large_uint8", 256, torch.uint8, 16, 224, False),
    ("patch14_uint8", 64, torch.uint8, 14, 518, False),
    ("small", 1, None, 16, 224, False),
    ("small_uint8", 1, torch.uint8, 16, 224, False),
    ("large_autocast", 256, torch.float32, 16, 224, False),
    ("patch14", 64, None, 14, 518, False),
    ("channels_last", 256, None, 16, 224, True),
    ("channels_last_uint8", 256, torch.uint8, 16, 224, True),
    ("patch8", 64, None, 8, 224, False),
    ("patch32_autocast", 256, torch.float32, 32, 224, False),
)


def aot_cases(arch: int = 80) -> list[AotCase]:
    """What a device of this architecture compiles for the usual ViTs: every setting, kind of pixel and layout."""
    shapes = {torch.bfloat16: _AOT_SHAPES, torch.float16: _AOT_SHAPES[:3], torch.float32: _AOT_SHAPES[:5]}
    cases: list[AotCase] = []
    for dtype, rows in shapes.items():
        for shape, *sizes in rows:
            for kernel, launch in _aot_launches(dtype, *sizes, Limits.of_arch(arch)).items():
                case = launch.aot_case(f"patch_embed_{kernel}_{shape}_{str(dtype).removeprefix('torch.')}")
                if not any(replace(case, name=other.name) == other for other in cases):
                    cases.append(case)
    return cases


def _aot_launches(
    dtype: torch.dtype, batch: int, pixels: torch.dtype | None, patch: int, side: int, last: bool, device: Limits
) -> dict[str, Launch]:
    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    dim, num_prefix, num_patches = 768, 1, (side // patch) ** 2
    images = meta(batch, 3, side, side, dtype=pixels or dtype)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    weight, bias = meta(dim, 3, patch, patch), meta(dim)
    tables = torch.float32 if pixels == torch.float32 else dtype  # autocast: all is float32 but what is multiplied
    prefix, pos_embed = meta(num_prefix, dim, dtype=tables), meta(num_prefix + num_patches, dim, dtype=tables)
    tokens = meta(batch, num_prefix + num_patches, dim, dtype=tables)
    mean = std = meta(3, dtype=torch.float32) if pixels == torch.uint8 else None
    view = PatchView.of(images, weight)
    dweight, partial = _dweight(view, tokens, images, weight, num_prefix, mean, std, device)
    launches = {
        "fwd": _forward(view, images, view.matrix(weight), bias, pos_embed, prefix, mean, std, tokens, device),
        "dweight": dweight,
        "dweight_sum": _sum(partial, meta(dim, view.size)),
        "token_sum": _sum(tokens, meta(*tokens.shape[1:], dtype=torch.float32)),
    }
    if images.is_floating_point():
        launches["dimages"] = _dimages(view, tokens, weight, num_prefix, std, images, device)
    return launches
