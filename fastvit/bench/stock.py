"""Stock PyTorch: what this package is compared with. The best plain calls for each op, and a ViT made of them.

Nothing here touches a kernel or the dispatcher, so a fault there cannot hide in the baseline.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..reference import layernorm_linear, layernorm_mlp, linear_residual, patch_embed

__all__ = [
    "VisionTransformer",
    "attention",
    "attention_packed",
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


class VisionTransformer(nn.Module):
    """The plain ViT of the paper, with timm's parameter names and the sizes of ``like``: (B, 3, IH, IW) -> logits.

    LayerScale and the head where ``like`` has them; without a head, the class token's features (B, E).
    """

    def __init__(self, like: Any):
        super().__init__()
        width, patch = like.cls_token.shape[-1], like.patch_embed.proj.kernel_size
        self.cls_token = nn.Parameter(torch.zeros(like.cls_token.shape))
        self.pos_embed = nn.Parameter(torch.zeros(like.pos_embed.shape))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*(_Block(block, width) for block in like.blocks))
        self.norm = nn.LayerNorm(width, eps=like.norm.eps)
        has_head = isinstance(like.head, nn.Linear)
        self.head = nn.Linear(width, like.head.out_features) if has_head else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, IH, IW) -> (B, 1 + L, E)."""
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        return self.norm(self.blocks(tokens))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images)[:, 0])


class _Block(nn.Module):
    def __init__(self, like: Any, width: int):
        super().__init__()
        hidden = like.mlp.fc1.out_features
        self.num_heads = like.attn.num_heads
        self.norm1 = nn.LayerNorm(width, eps=like.norm1.eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = _LayerScale(width) if hasattr(like.ls1, "gamma") else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=like.norm2.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, width)})
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
