"""The model that fastvit is compared with: timm's, or the same layers written with torch.nn alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stock_model(name: str, model: nn.Module, img_size: int) -> tuple[nn.Module, str]:
    """A headless stock model with ``model``'s weights, and what it is: "timm <version>" or "torch.nn"."""
    try:
        import timm
    except (ImportError, RuntimeError):  # timm imports torchvision, which may not fit this torch
        stock: nn.Module = StockViT(model)
        kind = "torch.nn"
    else:
        stock = timm.create_model(name, pretrained=False, img_size=img_size, num_classes=0)
        kind = f"timm {timm.__version__}"
    stock.load_state_dict(model.state_dict())
    weight = next(model.parameters())
    return stock.to(weight.device, weight.dtype).train(model.training), kind


class StockViT(nn.Module):
    """A ViT in plain torch.nn (SDPA for attention), of ``like``'s sizes, with timm's parameter names and no head."""

    def __init__(self, like: Any):
        super().__init__()
        width = like.cls_token.shape[-1]
        self.cls_token = nn.Parameter(torch.empty_like(like.cls_token))
        self.pos_embed = nn.Parameter(torch.empty_like(like.pos_embed))
        patch = like.patch_embed.proj.kernel_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*(_Block(block, width) for block in like.blocks))
        self.norm = nn.LayerNorm(width, eps=like.norm.eps)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, IH, IW) to (B, 1 + L, E)."""
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        return self.norm(self.blocks(tokens))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, IH, IW) to the class token's features (B, E)."""
        return self.forward_features(images)[:, 0]


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
        x = x + self.ls1(self._attention(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](self.mlp["act"](self.mlp["fc1"](self.norm2(x)))))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
