"""A ViT's modules, with timm's parameter names, attributes and constructor arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import (
    attend_packed,
    block_forward,
    class_token_block_forward,
    embed_forward,
    gated_activation,
    why_not_fused,
    why_not_fused_embed,
    why_not_skip,
)
from .norm_act import Layer, LayerNorm, LayerNormFp32, QuickGELU, RmsNorm, get_act_layer, get_norm_layer
from .ops import patch_embed
from .reference import unpack_qkv
from .resample import resample_patch_weight

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "GluMlp",
    "LayerNorm",
    "LayerNormFp32",
    "LayerScale",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "QuickGELU",
    "RmsNorm",
    "SwiGLU",
    "SwiGLUPacked",
    "block_forward",
    "class_token_block_forward",
    "embed_forward",
    "get_act_layer",
    "get_norm_layer",
    "to_pair",
    "why_not_fused",
    "why_not_fused_embed",
]

torch.fx.wrap("patch_embed")


def to_pair(value: Any) -> tuple[Any, Any]:
    """``value`` twice, or ``value`` itself when it is a pair already."""
    if isinstance(value, (tuple, list)):
        first, second = value
        return first, second
    return value, value


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False, device=None, dtype=None):
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class DropPath(nn.Module):
    """Drop a whole branch for some samples. "Deep Networks with Stochastic Depth" (Huang et al., 2016)."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            kept.div_(keep_prob)
        return x * kept

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class PatchDropout(nn.Module):
    """Keep a random share of the patch tokens while training. "Scaling Language-Image Pre-training via Masking"."""

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False):
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"PatchDropout: prob is {prob}, expected 0 <= prob < 1")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, length, dim = patches.shape
        num_keep = max(1, int(length * (1.0 - self.prob)))
        keep = torch.randn(batch, length, device=x.device).argsort(dim=-1)[:, :num_keep]
        keep = keep.sort(dim=-1).values if self.ordered else keep
        return torch.cat([prefix, patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, dim))], dim=1)


class PatchEmbed(nn.Module):
    """Images (B, C, IH, IW) to patch tokens (B, L, E), or (B, rows, columns, E) with ``output_fmt="NHWC"``."""

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if output_fmt not in (None, "NCHW", "NHWC", "NLC", "NCL"):
            raise ValueError(f"PatchEmbed: output_fmt is {output_fmt!r}, expected NCHW, NHWC, NLC or NCL")
        self.patch_size = to_pair(patch_size)
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        kernel = self.patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride=kernel, bias=bias, device=device, dtype=dtype)
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()

    def _set_img_size(self, img_size: int | tuple[int, int] | None) -> None:
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is not None:
            self.img_size = to_pair(img_size)
            self.grid_size = tuple(side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True))
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images or patches of another size; the projection is resampled for new patches."""
        if patch_size is not None and to_pair(patch_size) != self.patch_size:
            self.patch_size = to_pair(patch_size)
            old = self.proj
            self.proj = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                self.patch_size,
                stride=self.patch_size,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            ).train(old.training)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_weight(old.weight, self.patch_size))
                self.proj.weight.requires_grad_(old.weight.requires_grad)
                if old.bias is not None and self.proj.bias is not None:
                    self.proj.bias.copy_(old.bias)
                    self.proj.bias.requires_grad_(old.bias.requires_grad)
        self._set_img_size(img_size or self.img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of patches of an image of ``img_size`` pixels."""
        (height, width), (rows, columns) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return -(-height // rows), -(-width // columns)
        return height // rows, width // columns

    def check_size(self, height: int, width: int) -> None:
        """Refuse images that this embedding was not set up for."""
        if self.img_size is None or isinstance(height, torch.fx.Proxy):
            return
        came, (rows, columns) = f"patch_embed: images are {height} x {width} pixels", self.patch_size
        if self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(f"{came}, expected {self.img_size[0]} x {self.img_size[1]} (or dynamic_img_size=True)")
        if not self.strict_img_size and not self.dynamic_img_pad and (height % rows or width % columns):
            raise ValueError(f"{came}, expected multiples of {rows} x {columns} (or dynamic_img_pad=True)")

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[-1]
        self.check_size(height, width)
        rows, columns = self.dynamic_feat_size((height, width))
        below, right = rows * self.patch_size[0] - height, columns * self.patch_size[1] - width
        if self.dynamic_img_pad:
            x = F.pad(x, (0, right, 0, below))
        else:  # a strided convolution drops what is left of the last whole patch
            x = x[:, :, : rows * self.patch_size[0], : columns * self.patch_size[1]]
        if why_not_skip(self.proj, "proj", "Conv2d"):
            tokens = self.proj(x).flatten(2).transpose(1, 2)
        else:
            tokens = patch_embed(x, self.proj.weight, self.proj.bias)
        if self.output_fmt in ("NCHW", "NCL") and not self.flatten:
            tokens = tokens.transpose(1, 2)
        if self.output_fmt in ("NCHW", "NHWC") and not self.flatten:
            tokens = torch.unflatten(tokens, 2 if self.output_fmt == "NCHW" else 1, (rows, columns))
        return self.norm(tokens)


class Attention(nn.Module):
    """Multi-head self-attention with a packed qkv projection.

    ``fused_attn = False`` computes the attention weights in plain sight, through ``attn_drop``, where a hook sees them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"Attention: dim is {dim}, expected a multiple of num_heads ({num_heads})")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("Attention: norm_layer is None, expected a class when qk_norm or scale_norm is set")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if norm_layer and qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if norm_layer and qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **factory) if norm_layer and scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x)
        attend = attend_packed if self.fused_attn else _attend_in_plain_sight
        tokens = self.norm(attend(self, qkv, attn_mask, is_causal))
        if self.gate is not None:
            tokens = tokens * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(tokens))


def _attend_in_plain_sight(attn: Any, qkv: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = unpack_qkv(qkv, attn.num_heads)
    scores = attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)
    weights = _masked(scores, attn_mask, is_causal).softmax(dim=-1)
    return (attn.attn_drop(weights) @ v).transpose(1, 2).flatten(2)


def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask


torch.fx.wrap("_masked")  # which branch it takes is decided when a traced graph runs


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _no_convolution(use_conv)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, biases, drops = hidden_features or in_features, to_pair(bias), to_pair(drop)
        self.fc1 = nn.Linear(in_features, hidden, bias=biases[0], **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drops[0])
        self.norm = norm_layer(hidden, **factory) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=biases[1], **factory)
        self.drop2 = nn.Dropout(drops[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class GluMlp(nn.Module):
    """A gated MLP on one packed projection. "GLU Variants Improve Transformer" (Shazeer, 2020)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.Sigmoid,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        gate_last: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _no_convolution(use_conv)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, biases, drops = hidden_features or in_features, to_pair(bias), to_pair(drop)
        if hidden % 2:
            raise ValueError(f"GluMlp: hidden_features is {hidden}, expected an even number")
        self.gate_last = gate_last
        self.fc1 = nn.Linear(in_features, hidden, bias=biases[0], **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drops[0])
        self.norm = norm_layer(hidden // 2, **factory) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden // 2, out_features or in_features, bias=biases[1], **factory)
        self.drop2 = nn.Dropout(drops[1])

    def init_weights(self) -> None:
        """Start with the gate's half near an open gate."""
        half = self.fc1.weight.shape[0] // 2
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[half:])
        nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(gated_activation(self, self.fc1(x))))))


SwiGLUPacked = partial(GluMlp, act_layer=nn.SiLU, gate_last=False)


class SwiGLU(nn.Module):
    """A gated MLP on two projections, ``fc2(act(fc1_g(x)) * fc1_x(x))``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.SiLU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        align_to: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, biases, drops = hidden_features or in_features, to_pair(bias), to_pair(drop)
        hidden += -hidden % align_to if align_to else 0
        self.fc1_g = nn.Linear(in_features, hidden, bias=biases[0], **factory)
        self.fc1_x = nn.Linear(in_features, hidden, bias=biases[0], **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drops[0])
        self.norm = norm_layer(hidden, **factory) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=biases[1], **factory)
        self.drop2 = nn.Dropout(drops[1])

    def init_weights(self) -> None:
        """Start with an open gate."""
        if self.fc1_g.bias is not None:
            nn.init.ones_(self.fc1_g.bias)
        nn.init.normal_(self.fc1_g.weight, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop2(self.fc2(self.norm(self.drop1(hidden))))


def _no_convolution(use_conv: bool) -> None:
    if use_conv:
        raise ValueError("use_conv is True, expected False: these MLPs take tokens, not feature maps")


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with LayerScale and DropPath on its branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: Layer = Attention,
        depth: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **factory)
        self.attn = _attention_class(attn_layer)(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **factory,
        )
        self.ls1 = LayerScale(dim, init_values=init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **factory,
        )
        self.ls2 = LayerScale(dim, init_values=init_values, **factory) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return block_forward(self, x, attn_mask, is_causal)


def _attention_class(attn_layer: Layer) -> Callable[..., nn.Module]:
    if attn_layer in ("", "attn"):
        return Attention
    if attn_layer is None or isinstance(attn_layer, str):
        raise ValueError(f"attn_layer is {attn_layer!r}, expected 'attn' or a module class")
    return attn_layer
