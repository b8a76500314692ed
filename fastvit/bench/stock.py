"""Stock PyTorch: what this package is compared with. The best plain calls for each op, and a ViT made of them.

Nothing here touches a kernel or the dispatcher, so a fault there cannot hide in the baseline.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..layers import LayerNorm, Mlp
from ..reference import layernorm_linear, layernorm_mlp, linear_residual, patch_embed

__all__ = [
    "VisionTransformer",
    "attention",
    "attention_packed",
    "attention_varlen",
    "layernorm_linear",
    "layernorm_mlp",
    "linear_residual",
    "patch_embed",
]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, D) each; PyTorch's own fused attention."""
    return F.scaled_dot_product_attention(q, k, v)


def attention_packed(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3 * H * D) -> (B, N, H * D), as timm does it."""
    return attention(*reference.unpack_qkv(qkv, num_heads)).transpose(1, 2).flatten(2)


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(T, H, D) each; padded, with a key-padding mask."""
    (q, k, v), mask = reference.pad_samples((q, k, v), cu_seqlens, max_seqlen)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return reference.unpad_samples(out, cu_seqlens, int(cu_seqlens[-1]))


class VisionTransformer(nn.Module):
    """A ViT with timm's parameter names and everything that ``like`` has: (B, 3, IH, IW) -> (B, classes).

    Without a head the pooled features (B, E). Raises ``ValueError`` for what no plain ViT has, see ``why_not_plain``.
    """

    def __init__(self, like: Any):
        super().__init__()
        if reasons := why_not_plain(like):
            raise ValueError(f"stock PyTorch's side is written for plain ViTs, and here {'; '.join(reasons)}")
        width, proj = like.embed_dim, like.patch_embed.proj
        self.no_embed_class, self.global_pool = like.no_embed_class, like.global_pool
        self.pool_include_prefix, self.num_prefix_tokens = like.pool_include_prefix, like.num_prefix_tokens
        self.cls_token, self.reg_token = _zeros(like.cls_token), _zeros(like.reg_token)
        self.pos_embed = nn.Parameter(torch.zeros(like.pos_embed.shape))
        conv = nn.Conv2d(proj.in_channels, width, proj.kernel_size, proj.kernel_size, bias=proj.bias is not None)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.norm_pre, self.norm, self.fc_norm = (_norm(getattr(like, n)) for n in ("norm_pre", "norm", "fc_norm"))
        self.blocks = nn.Sequential(*(_Block(block, width) for block in like.blocks))
        self.head = _linear(like.head) if isinstance(like.head, nn.Linear) else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, IH, IW) -> (B, T + L, E)."""
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        prefix = [t.expand(len(tokens), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.no_embed_class:
            tokens = torch.cat([*prefix, tokens + self.pos_embed], dim=1)
        else:
            tokens = torch.cat([*prefix, tokens], dim=1) + self.pos_embed
        return self.norm(self.blocks(self.norm_pre(tokens)))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.forward_features(images)
        if self.global_pool == "token":
            return self.head(self.fc_norm(tokens[:, 0]))
        tokens = tokens if self.pool_include_prefix else tokens[:, self.num_prefix_tokens :]
        return self.head(self.fc_norm(tokens.mean(dim=1)))


def why_not_plain(like: Any) -> list[str]:
    """What ``like``, a ``fastvit.VisionTransformer``, has beyond a plain ViT."""
    pools = ("token", "avg")
    reasons = [] if like.global_pool in pools else [f"global_pool is {like.global_pool!r}, not one of {pools}"]
    if like.pos_embed is None:
        reasons.append("there is no position table")
    if not isinstance(like.patch_embed.norm, nn.Identity):
        reasons.append("the patch embedding has a norm")
    norms = [like.norm_pre, like.norm, like.fc_norm]
    for block in like.blocks:
        norms += [block.norm1, block.norm2]
        if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
            reasons.append("an MLP is gated or normalised inside")
        inside = (getattr(block.attn, name) for name in ("q_norm", "k_norm", "norm"))
        if block.attn.gate is not None or not all(isinstance(norm, nn.Identity) for norm in inside):
            reasons.append("an attention is gated or normalised inside")
    if any(type(norm) not in (nn.LayerNorm, LayerNorm, nn.Identity) for norm in norms):
        reasons.append("a norm is no LayerNorm")
    return list(dict.fromkeys(reasons))


def _zeros(like: Tensor | None) -> nn.Parameter | None:
    return None if like is None else nn.Parameter(torch.zeros(like.shape))


def _linear(like: nn.Linear) -> nn.Linear:
    return nn.Linear(like.in_features, like.out_features, bias=like.bias is not None)


def _norm(like: nn.Module) -> nn.Module:
    if isinstance(like, nn.LayerNorm):
        return nn.LayerNorm(like.normalized_shape, eps=like.eps, elementwise_affine=like.elementwise_affine)
    return nn.Identity()


class _Block(nn.Module):
    def __init__(self, like: Any, width: int):
        super().__init__()
        self.num_heads = like.attn.num_heads
        self.norm1, self.norm2 = _norm(like.norm1), _norm(like.norm2)
        self.attn = nn.ModuleDict({"qkv": _linear(like.attn.qkv), "proj": _linear(like.attn.proj)})
        act = copy.deepcopy(like.mlp.act)
        self.mlp = nn.ModuleDict({"fc1": _linear(like.mlp.fc1), "act": act, "fc2": _linear(like.mlp.fc2)})
        self.ls1 = _LayerScale(width) if hasattr(like.ls1, "gamma") else nn.Identity()
        self.ls2 = _LayerScale(width) if hasattr(like.ls2, "gamma") else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn["proj"](attention_packed(self.attn["qkv"](self.norm1(x)), self.num_heads)))
        return x + self.ls2(self.mlp["fc2"](self.mlp["act"](self.mlp["fc1"](self.norm2(x)))))


class _LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
