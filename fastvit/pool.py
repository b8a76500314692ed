"""Attention pools: a head's view of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .fused import mlp_residual
from .layers import Mlp
from .ops import attention
from .weight_init import truncated_normal_

torch.fx.wrap("attention")


class AttentionPoolLatent(nn.Module):
    """Pool by attention with learned queries, SigLIP's "map" head.

    x        (B, N, E)
    returns  (B, out_features), or (B, latent_len, out_features) with ``pool_type=""``
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        embed_dim: int | None = None,
        num_heads: int = 8,
        feat_size: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        q_proj: bool = True,
        qk_norm: bool = False,
        latent_len: int = 1,
        latent_dim: int | None = None,
        pos_embed: str = "",
        pool_type: str = "token",
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        embed_dim = embed_dim or in_features
        out_features = in_features if out_features is None else out_features
        if embed_dim % num_heads:
            raise ValueError(f"AttentionPoolLatent: embed_dim is {embed_dim}, expected a multiple of {num_heads} heads")
        if pos_embed == "abs" and feat_size is None:
            raise ValueError("AttentionPoolLatent: feat_size is None, expected a size with pos_embed='abs'")
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.feat_size = feat_size
        self.scale = self.head_dim**-0.5
        self.pool = pool_type
        self.fused_attn = True
        table = pos_embed == "abs"
        self.pos_embed = nn.Parameter(torch.zeros(feat_size, in_features, **factory)) if table else None  # type: ignore
        self.latent_dim = latent_dim or embed_dim
        if not q_proj and self.latent_dim != embed_dim:
            raise ValueError(f"AttentionPoolLatent: latent_dim is {latent_dim}, expected {embed_dim} without q_proj")
        self.latent_len = latent_len
        self.latent = nn.Parameter(torch.zeros(1, latent_len, self.latent_dim, **factory))
        self.q = nn.Linear(self.latent_dim, embed_dim, bias=qkv_bias, **factory) if q_proj else nn.Identity()
        self.kv = nn.Linear(embed_dim, 2 * embed_dim, bias=qkv_bias, **factory)
        qk_norm_layer = norm_layer or nn.LayerNorm
        self.q_norm = qk_norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = qk_norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        projects = out_features > 0
        self.proj = nn.Linear(embed_dim, out_features, **factory) if projects else nn.Identity()
        self.proj_drop = nn.Dropout(drop)
        self.norm = norm_layer(out_features, **factory) if projects and norm_layer else nn.Identity()
        hidden = int(out_features * mlp_ratio)
        self.mlp = Mlp(out_features, hidden, act_layer=act_layer, **factory) if projects else None
        self.out_features = out_features if projects else embed_dim
        self.init_weights()

    def init_weights(self) -> None:
        with torch.no_grad():
            if self.pos_embed is not None:
                truncated_normal_(self.pos_embed).mul_(self.pos_embed.shape[1] ** -0.5)
            truncated_normal_(self.latent).mul_(self.latent_dim**-0.5)

    @property
    def norm2(self) -> nn.Module:
        """The name under which ``mlp_residual`` looks for the norm before an MLP."""
        return self.norm

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        q = torch.unflatten(self.q(self.latent.expand(x.shape[0], -1, -1)), -1, (self.num_heads, -1)).transpose(1, 2)
        k, v = torch.unflatten(self.kv(x), -1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, scale=self.scale)
        tokens = self.proj_drop(self.proj(tokens.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            tokens = mlp_residual(self, tokens)
        if self.pool == "token":
            return tokens[:, 0]
        return tokens.mean(1) if self.pool == "avg" else tokens


class AttentionPoolPrr(nn.Module):
    """Refine all tokens by attention without parameters, then pool. "Locality-Attending Vision Transformer" (2026)."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        pool_type: str = "token",
        pre_norm: bool = False,
        post_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if pool_type not in ("token", "avg") or dim % num_heads:
            raise ValueError(
                f"AttentionPoolPrr: pool_type is {pool_type!r} and dim {dim}, expected token or avg and a multiple of"
                f" {num_heads} heads"
            )
        layer = norm_layer or nn.LayerNorm
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.pool = pool_type
        self.fused_attn = True
        self.out_features = dim
        self.pre_norm = layer(dim, device=device, dtype=dtype) if pre_norm else nn.Identity()
        self.post_norm = layer(dim, device=device, dtype=dtype) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.unflatten(self.pre_norm(x), -1, (self.num_heads, -1)).transpose(1, 2)
        x = self.post_norm(attention(heads, heads, heads, scale=self.scale).transpose(1, 2).flatten(2))
        return x[:, 0] if self.pool == "token" else x.mean(1)
