"""What every operator means, in plain PyTorch.

One function per op, differentiable, for any float dtype including float64. Nothing here imports a kernel: these
functions are the specification that every backend is measured against.

Shape letters, used throughout the package:
    B  batch            N  tokens              E  embedding width     H  attention heads     D  head dim
    F  MLP hidden size  O  output features     C  image channels      PH, PW  patch sides    IH, IW  image sides
    T  prefix tokens (class, distillation, register)                  L  patches, (IH // PH) * (IW // PW)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def activation(h: Tensor, act: str) -> Tensor:
    """Apply ``act`` to ``h``: "gelu" (exact, erf), "gelu_tanh" or "quick_gelu" (CLIP's ``h * sigmoid(1.702 h)``)."""
    if act == "gelu":
        return F.gelu(h)
    if act == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if act == "quick_gelu":
        return h * torch.sigmoid(1.702 * h)
    raise ValueError(f"activation: act is {act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")


def normalize_pixels(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(images - mean) / std`` per channel in ``dtype``; uint8 pixels are divided by 255 first."""
    pixels = images.to(dtype)
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None:
        pixels = pixels - mean.to(dtype).view(-1, 1, 1)
    if std is not None:
        pixels = pixels / std.to(dtype).view(-1, 1, 1)
    return pixels


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
    """Image to tokens: normalise, project each patch, prepend the prefix tokens, add the position table.

    images     (B, C, IH, IW)   float or uint8; IH, IW multiples of PH, PW
    weight     (E, C, PH, PW)
    bias       (E,)             optional
    pos_embed  (L, E): added to the patch tokens only; or (T + L, E): added to all tokens
    prefix     (T, E)           class, distillation and register tokens, placed first
    mean, std  (C,)             in units of [0, 1] pixels
    returns    (B, T + L, E)    dtype of weight

    Source: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021), equation 1.
    """
    pixels = normalize_pixels(images, mean, std, weight.dtype)
    tokens = F.conv2d(pixels, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    return assemble_tokens(tokens, pos_embed, prefix)


def assemble_tokens(patches: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Prepend the prefix tokens to (B, L, E) patches and add the position table, to the patches or to all."""
    if pos_embed is not None and pos_embed.shape[0] == patches.shape[1]:
        patches, pos_embed = patches + pos_embed, None
    if prefix is not None:
        patches = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
    return patches if pos_embed is None else patches + pos_embed


class HeadNorm(NamedTuple):
    """Normalisation of q or k over the head dim: LayerNorm or, with ``rms``, division by the root mean square.

    weight, bias  (D,)  optional; no bias with rms

    Source: "Scaling Vision Transformers to 22 Billion Parameters" (Dehghani et al., 2023).
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    rms: bool = False


class Rope(NamedTuple):
    """Rotation of q and k by their position: token t of the sequence by row t - num_prefix of the table.

    table       broadcastable to (B, H, L, 2 * D): the sines of the D columns, then their cosines, as timm has them
    num_prefix  tokens at the start that are not rotated (class, register)
    half        column c turns with column c + D / 2 (DINOv3); otherwise column 2 i with 2 i + 1 (EVA-02)

    Source: "RoFormer" (Su et al., 2021); for images "EVA-02" (Fang et al., 2023).
    """

    table: Tensor
    num_prefix: int = 0
    half: bool = False


def normalize_heads(x: Tensor, norm: HeadNorm | None) -> Tensor:
    """``norm`` over the last dim of ``x``, with statistics in at least float32; in the dtype of ``x``."""
    if norm is None:
        return x
    dtype = x.dtype if norm.weight is None else torch.promote_types(x.dtype, norm.weight.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (norm.weight, norm.bias))
    if norm.rms:
        return F.rms_norm(x.to(dtype), x.shape[-1:], weight, norm.eps).to(x.dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, norm.eps).to(x.dtype)


def rotate_heads(x: Tensor, rope: Rope | None) -> Tensor:
    """``rope`` applied to the tokens (B, H, N, D) of ``x``; in the dtype of ``x``."""
    if rope is None:
        return x
    prefix, tokens = x[..., : rope.num_prefix, :], x[..., rope.num_prefix :, :]
    sin, cos = rope.table[..., : tokens.shape[-2], :].chunk(2, dim=-1)
    if rope.half:
        first, second = tokens.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-tokens[..., 1::2], tokens[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([prefix, (tokens * cos + turned * sin).to(x.dtype)], dim=-2)


def prepare_heads(x: Tensor, norm: HeadNorm | None, rope: Rope | None) -> Tensor:
    """What attention compares: ``x`` normalised, then rotated."""
    return rotate_heads(normalize_heads(x, norm), rope)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Multi-head attention, ``dropout(softmax(q k^T * scale + mask)) v``.

    q             (B, H, Nq, D)
    k, v          (B, H, Nk, D)
    attn_mask     broadcastable to (B, H, Nq, Nk); bool (True takes part) or float (added to the scores)
    is_causal     query m attends to keys 0 to m
    dropout_p     probability of dropping a weight; the others grow by 1 / (1 - dropout_p)
    dropout_seed  (1,) int64; see dropout_keeps
    scale         default D ** -0.5
    q_norm        of q over D, before all else; k_norm of k
    rope          rotates q and k, once normalised
    returns       (B, H, Nq, D); a query whose every key is masked gets zeros

    Source: "Attention Is All You Need" (Vaswani et al., 2017).
    """
    q, k = prepare_heads(q, q_norm, rope), prepare_heads(k, k_norm, rope)
    weights = attention_weights(q, k, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    if dropout_p > 0.0 and dropout_seed is not None:
        weights = weights * dropout_keeps(dropout_seed, dropout_p, weights.shape) / (1.0 - dropout_p)
    return weights.to(v.dtype) @ v


def attention_weights(
    q: Tensor, k: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The weights (B, H, Nq, Nk) that ``attention`` gives to v, before dropout."""
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    masked_out = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(masked_out, 0.0), dim=-1).masked_fill(masked_out, 0.0)


def dropout_keeps(seed: Tensor, dropout_p: float, shape: Sequence[int]) -> Tensor:
    """Which attention weights (B, H, Nq, Nk) dropout keeps: a pure function of the seed and a weight's place.

    seed   (1,) int64    the key of Philox-4x32-10; the counter is (key, query, sample * H + head, 0)

    A weight is kept if the upper 24 bits of the first random word reach dropout_p * 2^24. Source: "Parallel Random
    Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011).
    """
    batch, heads, queries, keys = shape
    word = 0xFFFFFFFF
    places = (keys, queries, batch * heads)
    c0, c1, c2 = (torch.arange(size, device=seed.device) for size in places)
    c0, c1, c2 = torch.broadcast_tensors(c0, c1.view(-1, 1), c2.view(batch, heads, 1, 1))
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; int64 wraps without losing a bit
        c0, c1 = ((high >> 32) & word) ^ c1 ^ k0, high & word
        c2, c3 = ((low >> 32) & word) ^ c3 ^ k1, low & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return (c0 >> 8) >= round(dropout_p * 2**24)


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Self-attention on a packed projection.

    qkv      (B, N, 3 * H * D)  ordered q, k, v, then head, then head dim
    returns  (B, N, H * D)

    Otherwise as ``attention``.
    """
    q, k, v = unpack_qkv(qkv, num_heads)
    q, k = prepare_heads(q, q_norm, rope), prepare_heads(k, k_norm, rope)
    out = attention(q, k, v, dropout_p=dropout_p, dropout_seed=dropout_seed, scale=scale)
    return out.transpose(1, 2).flatten(2)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Self-attention within each of S samples whose rows lie one after another.

    q, k, v     (T, H, D)
    cu_seqlens  (S + 1,)   int: sample s has the rows from cu_seqlens[s] to cu_seqlens[s + 1]
    max_seqlen             of rows in a sample
    rope                   its table has a row for each of the T rows, (T, 2 * D) or (H, T, 2 * D), and no prefix
    returns     (T, H, D)

    Otherwise as ``attention``.
    """
    q, k = (prepare_heads(t.transpose(0, 1), norm, rope).transpose(0, 1) for t, norm in ((q, q_norm), (k, k_norm)))
    heads, mask = pad_samples((q, k, v), cu_seqlens, max_seqlen)
    dropout = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
    out = attention(*heads, attn_mask=mask, is_causal=is_causal, scale=scale, **dropout)  # type: ignore[arg-type]
    return unpad_samples(out, cu_seqlens, q.shape[0])


def pad_samples(rows: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> tuple[list[Tensor], Tensor]:
    """Tensors (T, H, D) as (S, H, max_seqlen, D), zeros after a sample's end, and their mask (S, 1, 1, max_seqlen)."""
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    index = begin[:, None] + torch.arange(max_seqlen, device=cu_seqlens.device)
    inside = index < end[:, None]
    index = torch.where(inside, index, 0)
    padded = [t[index].masked_fill(~inside[..., None, None], 0).transpose(1, 2) for t in rows]
    return padded, inside[:, None, None, :]


def unpad_samples(padded: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """The inverse: (S, H, max_seqlen, D) as (rows, H, D)."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sample = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
    return padded.transpose(1, 2)[sample, row - cu_seqlens.long()[sample]]


def unpack_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each (B, H, N, D), on a packed (B, N, 3 * H * D) tensor."""
    # not qkv.unflatten: torch.compile cannot trace that method under torch.set_default_device
    q, k, v = torch.unflatten(qkv, -1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``linear(layer_norm(x))``.

    x                       (..., E)
    norm_weight, norm_bias  (E,)     optional
    weight                  (O, E)
    bias                    (O,)     optional
    returns                 (..., O) dtype of weight
    """
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps).to(weight.dtype), weight, bias)


def add_branch(residual: Tensor, branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """``residual + row_scale * layer_scale * branch``; ``row_scale`` (B,) scales whole samples (DropPath)."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if row_scale is not None:
        branch = branch * row_scale.view(-1, *[1] * (branch.dim() - 1)).to(branch.dtype)
    return residual + branch


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``residual + row_scale * layer_scale * linear(x)``: the attention projection and its residual.

    x            (B, ..., E)
    weight       (O, E)
    bias         (O,)         optional
    residual     (B, ..., O)
    layer_scale  (O,)         optional; "Going deeper with Image Transformers" (Touvron et al., 2021)
    row_scale    (B,)         optional; one factor a sample: DropPath's 0 or 1 / keep_prob. Not differentiated
    returns      (B, ..., O)  dtype of residual
    """
    return add_branch(residual, F.linear(x, weight, bias), layer_scale, row_scale)


def layernorm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    act: str = "gelu",
    eps: float = 1e-6,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: bool = True,
) -> Tensor:
    """``x + row_scale * layer_scale * fc2(act(fc1(layer_norm(x))))``: the MLP half of a ViT block.

    x                       (B, ..., E)
    norm_weight, norm_bias  (E,)    optional
    fc1_weight, fc1_bias    (F, E), (F,)
    fc2_weight, fc2_bias    (E, F), (E,)
    act                     "gelu" (erf) | "gelu_tanh" | "quick_gelu"
    layer_scale, row_scale  (E,), (B,)  as in linear_residual
    residual                False leaves out ``x +``
    returns                 (B, ..., E) dtype of x
    """
    hidden = activation(layernorm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps=eps), act)
    branch = F.linear(hidden, fc2_weight, fc2_bias)
    return add_branch(x if residual else torch.zeros_like(x), branch, layer_scale, row_scale)
