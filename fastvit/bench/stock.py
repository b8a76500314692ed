"""Stock PyTorch: what this package is compared with. The best plain calls for each op, and a ViT made of them.

Nothing here touches a kernel or the dispatcher, so a fault there cannot hide in the baseline.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
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


class _Attention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention_packed(self.qkv(x), self.num_heads))


class _Mlp(nn.Module):
    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = _Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = _Mlp(embed_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The plain ViT of the paper with timm's parameter names; (B, 3, IH, IW) -> (B, num_classes)."""

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        hidden_dim: int,
        patch_size: int = 16,
        image_size: int = 224,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, embed_dim))
        self.patch_embed = _PatchEmbed(embed_dim, patch_size)
        self.blocks = nn.Sequential(*[_Block(embed_dim, num_heads, hidden_dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])
