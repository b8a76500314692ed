"""Change the resolution of learned tables: position embeddings and patch projections."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


def square_grid(num_patches: int) -> tuple[int, int] | None:
    """The square grid with ``num_patches`` cells, or None when there is none."""
    side = int(num_patches**0.5 + 0.5)
    return (side, side) if side * side == num_patches else None


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Position table for another grid of patches: bicubic with antialiasing, in float32, as timm does it.

    pos_embed  (1, T + L, E)  the first ``num_prefix_tokens`` rows are kept as they are
    returns    (1, T + L', E) dtype of pos_embed
    """
    num_patches = pos_embed.shape[1] - num_prefix_tokens
    old_grid = old_grid or square_grid(num_patches)
    if old_grid is None:
        raise ValueError(f"pos_embed: {num_patches} patch positions form no square grid; pass old_grid")
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    image = torch.unflatten(patches.float(), 1, tuple(old_grid)).permute(0, 3, 1, 2)
    # Counting makes the sides plain numbers under torch.compile, which cannot differentiate this resize with symbols.
    sides = [len(range(side)) for side in new_grid]
    image = F.interpolate(image, size=sides, mode="bicubic", antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)


def resample_patch_weight(weight: Tensor, new_size: tuple[int, int]) -> Tensor:
    """Patch projection for another patch size, so that resized patches give the same tokens.

    With R the bicubic resize as a matrix, the new weight is the old one times the pseudo-inverse of R.
    Source: "FlexiViT: One Model for All Patch Sizes" (Beyer et al., 2023).

    weight   (E, C, PH, PW)
    returns  (E, C, *new_size) dtype of weight
    """
    old_size = weight.shape[-2:]
    if tuple(old_size) == tuple(new_size):
        return weight
    pixels = old_size[0] * old_size[1]
    basis = torch.eye(pixels, device=weight.device).view(pixels, 1, *old_size)
    resized = F.interpolate(basis, size=tuple(new_size), mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resized.flatten(1).T)
    return torch.unflatten(weight.flatten(2).float() @ inverse, -1, tuple(new_size)).to(weight.dtype)
