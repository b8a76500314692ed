"""Patch embedding: from pixels to position-aware tokens in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import Backend, Op
from . import _contract, _register
from .layernorm_linear import fake_grads, keep

NAME = "patch_embed"


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Normalise, project each patch, prepend the prefix tokens, add the position table.

    images     (B, C, IH, IW)   uint8, or float32 | bfloat16 | float16; any strides (channels-last is fine)
    weight     (E, C, PH, PW)   float32 | bfloat16 | float16; PH, PW divide IH, IW
    bias       (E,)             optional
    pos_embed  (L, E): for the patch tokens; or (T + L, E): for all tokens; optional
    prefix     (T, E)           optional; class, distillation and register tokens, placed first
    mean, std  (C,)             optional, in units of [0, 1] pixels; uint8 pixels are divided by 255 first
    returns    (B, T + L, E)    dtype of weight (under autocast: of pos_embed, as stock addition promotes)

    Raises ValueError for a wrong shape, dtype or device, Unsupported where a forced backend cannot run.
    Meaning: fastvit.reference.patch_embed.
    """
    return _contract.call(OP, _check, (1, 2), images, weight, bias, pos_embed, prefix, mean, std)


def _check(images, weight, bias, pos_embed, prefix, mean, std) -> None:
    if images.dim() != 4:
        raise ValueError(f"{NAME}: images has shape {tuple(images.shape)}, expected (B, C, IH, IW)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{NAME}: images is {images.dtype}, expected uint8 or a floating point dtype")
    if weight.dim() != 4 or weight.shape[1] != images.shape[1]:
        raise ValueError(f"{NAME}: weight has shape {tuple(weight.shape)}, expected (E, {images.shape[1]}, PH, PW)")
    (rows, columns), (height, width) = weight.shape[2:], images.shape[2:]
    if height % rows or width % columns or not height or not width:
        raise ValueError(
            f"{NAME}: images are {height} x {width} pixels, expected multiples of the patch, {rows} x {columns}"
        )
    _contract.check_together(NAME, "weight", weight, bias=bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std)
    if images.device != weight.device:
        raise ValueError(f"{NAME}: images is on {images.device}, expected {weight.device} like weight")
    if _contract.autocast_dtype(weight) is None:
        _check_dtypes(images, weight, bias, pos_embed, prefix)
    _check_tables(weight, bias, pos_embed, prefix, patches=(height // rows) * (width // columns))
    _contract.check_shape(NAME, "mean", mean, (images.shape[1],), "like the channels of images")
    _contract.check_shape(NAME, "std", std, (images.shape[1],), "like the channels of images")


def _check_dtypes(images, weight, bias, pos_embed, prefix) -> None:
    allowed = (weight.dtype, torch.float32, torch.uint8)
    _contract.check_dtype(NAME, "images", images, allowed, "like weight")
    for name, tensor in {"bias": bias, "pos_embed": pos_embed, "prefix": prefix}.items():
        _contract.check_dtype(NAME, name, tensor, (weight.dtype,), "like weight")


def _check_tables(weight, bias, pos_embed, prefix, patches: int) -> None:
    dim = weight.shape[0]
    _contract.check_shape(NAME, "bias", bias, (dim,), "like weight's rows")
    if prefix is not None and (prefix.dim() != 2 or prefix.shape[1] != dim):
        raise ValueError(f"{NAME}: prefix has shape {tuple(prefix.shape)}, expected (T, {dim})")
    if pos_embed is None:
        return
    tokens = patches + (0 if prefix is None else prefix.shape[0])
    # Compared one by one: `in` does not see through the symbolic sizes of torch.compile(dynamic=True).
    fits = pos_embed.dim() == 2 and pos_embed.shape[1] == dim
    if not fits or (pos_embed.shape[0] != patches and pos_embed.shape[0] != tokens):
        forms = " or ".join(str((rows, dim)) for rows in dict.fromkeys((patches, tokens)))
        raise ValueError(f"{NAME}: pos_embed has shape {tuple(pos_embed.shape)}, expected {forms}")


def _launch_fwd(backend, images, weight, bias, pos_embed, prefix, mean, std, dtype, cache):
    if backend == "cpp":
        cpp = _contract.compiled(backend)
        return cpp.patch_embed_fwd(images, weight, bias, pos_embed, prefix, mean, std, cache)
    from ..kernels import patch_embed as kernels  # type: ignore[attr-defined]

    return kernels.patch_embed_fwd(images, weight, bias, pos_embed, prefix, mean, std, dtype)


def _launch_bwd(backend, dout, images, weight, num_prefix, mean, std, wants):
    """(dimages, dweight, sum of dout over the samples), None for each that is not wanted."""
    if backend == "cpp":
        cpp = _contract.compiled(backend)
        return keep(wants, cpp.patch_embed_bwd(dout, images, weight, num_prefix, mean, std, wants))
    from ..kernels import patch_embed as kernels  # type: ignore[attr-defined]

    return kernels.patch_embed_bwd(dout, images, weight, num_prefix, mean, std, wants)


def _num_tokens(images: Tensor, weight: Tensor, prefix: Tensor | None) -> int:
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    return patches + (0 if prefix is None else prefix.shape[0])


def _token_dtype(weight: Tensor, *tables: Tensor | None) -> torch.dtype:
    """Of the tokens: under autocast the tables keep their own dtype, and adding them promotes."""
    dtype = weight.dtype
    for table in tables:
        dtype = dtype if table is None else torch.promote_types(dtype, table.dtype)
    return dtype


def _fwd(images, weight, bias, pos_embed, prefix, mean, std, cache, backend):
    dtype = _token_dtype(weight, pos_embed, prefix)
    return _launch_fwd(backend, images, weight, bias, pos_embed, prefix, mean, std, dtype, cache)


def _fwd_fake(images, weight, bias, pos_embed, prefix, mean, std, cache, backend):
    size = (images.shape[0], _num_tokens(images, weight, prefix), weight.shape[0])
    return weight.new_empty(size, dtype=_token_dtype(weight, pos_embed, prefix))


def _bwd(dout, images, weight, bias, pos_embed, prefix, mean, std, mask, backend):
    """Gradients of images, weight, bias, pos_embed and prefix; an empty tensor for each that is not wanted."""
    num_prefix = 0 if prefix is None else prefix.shape[0]
    wants = [mask[0], mask[1], any(mask[2:])]
    dimages, dweight, token_sum = _launch_bwd(backend, dout, images, weight, num_prefix, mean, std, wants)
    none = weight.new_empty(0)
    grads = [
        images.new_empty(0) if dimages is None else dimages,
        none if dweight is None else dweight,
        none,
        none,
        none,
    ]
    if token_sum is not None:
        patch_sum = token_sum[num_prefix:]
        if mask[2]:
            grads[2] = patch_sum.sum(0).to(weight.dtype)
        if mask[3]:
            on_patches = pos_embed.shape[0] == patch_sum.shape[0]
            grads[3] = (patch_sum if on_patches else token_sum).to(pos_embed.dtype, copy=True)
        if mask[4]:
            grads[4] = token_sum[:num_prefix].to(prefix.dtype, copy=True)
    return tuple(grads)


def _bwd_fake(dout, images, weight, bias, pos_embed, prefix, mean, std, mask, backend):
    return fake_grads(weight, mask, (images, weight, bias, pos_embed, prefix))


_fwd_op = _register.define(
    f"{NAME}_fwd",
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean, Tensor? std,"
    " bool cache, str backend) -> Tensor",
    _fwd,
    _fwd_fake,
)
_bwd_op = _register.define(
    f"{NAME}_bwd",
    "(Tensor dout, Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std, bool[] mask, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:5])
    grads = _bwd_op(dout, *ctx.saved_tensors, mask, ctx.backend)
    return *(grad if wanted else None for wanted, grad in zip(mask, grads, strict=True)), None, None, None, None


_INPUTS = ("images", "weight", "bias", "pos_embed", "prefix", "mean", "std")
_register.register_autograd(f"{NAME}_fwd", _setup_context, _backward)
_register.register_double_backward(
    f"{NAME}_bwd", reference.patch_embed, inputs=_INPUTS, arguments=("dout", *_INPUTS, "mask", "backend")
)


def _why_not_statistics(backend: str, mean: Tensor | None, std: Tensor | None) -> list[str]:
    if any(stat is not None and stat.requires_grad for stat in (mean, std)):
        return [f"mean or std requires a gradient, {backend} gives none"]
    return []


def _why_not_triton(images, weight, bias, pos_embed, prefix, mean, std):
    reasons = _contract.why_not_triton("weight", weight) + _why_not_statistics("triton", mean, std)
    dtype = _token_dtype(weight, pos_embed, prefix)
    if dtype not in (weight.dtype, torch.float32):
        reasons.append(f"pos_embed and prefix make the tokens {dtype}, triton writes {weight.dtype} or float32")
    return reasons


def _why_not_cpp(images, weight, bias, pos_embed, prefix, mean, std):
    return _contract.why_not_compiled("cpp", weight, weight, "weight") + _why_not_statistics("cpp", mean, std)


def _run_triton(images, weight, bias, pos_embed, prefix, mean, std):
    return _run(images, weight, bias, pos_embed, prefix, mean, std, "triton")


def _run_cpp(images, weight, bias, pos_embed, prefix, mean, std):
    if _token_dtype(weight, pos_embed, prefix) == weight.dtype:
        return _run(images, weight, bias, pos_embed, prefix, mean, std, "cpp")
    patches = _run(images, weight, bias, None, None, mean, std, "cpp")
    return reference.assemble_tokens(patches, pos_embed, prefix)


def _run(images, weight, bias, pos_embed, prefix, mean, std, backend):
    mean, std = _contract.cast(torch.float32, mean, std)
    cache = _contract.may_cache(weight)
    return _fwd_op(images, weight, bias, pos_embed, prefix, mean, std, cache, backend)


def _run_torch(images, weight, bias, pos_embed, prefix, mean, std):
    """Normalise in float32, then round once: eager code that normalises in the images' dtype loses more."""
    if mean is not None or std is not None or images.dtype != weight.dtype:
        wide = torch.promote_types(weight.dtype, torch.float32)
        images = reference.normalize_pixels(images, mean, std, wide).to(weight.dtype)
    return reference.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix=prefix)


def _run_reference(images, weight, bias, pos_embed, prefix, mean, std):
    return reference.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std)


OP = Op(
    NAME,
    Backend("triton", _run_triton, _why_not_triton, ("cuda",)),
    Backend("cpp", _run_cpp, _why_not_cpp, ("cpu",)),
    Backend("torch", _run_torch),
    Backend("reference", _run_reference),
)
