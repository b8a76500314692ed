"""A ViT with its embedding channels in another order: the same mathematics, summed in another order.

The rounding error that a whole model leaves in one gradient is a draw of luck. A sum over thousands of rows in which
large values cancel can come out ten times better or worse when nothing but the order of the channels changes, in stock
PyTorch as anywhere. So what stock's error *is* has to be asked of several such orders.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# The embedding axis of a parameter, by timm's names; None where it has none. All other names are unknown.
_MLP = r"(blocks\.\d+|attn_pool)\.mlp"
_AXES: dict[str, int | None] = {
    r"cls_token|reg_token|dist_token|pos_embed|attn_pool\.latent": -1,
    r"(patch_embed\.(proj|norm)|norm|norm_pre|fc_norm|attn_pool\.norm)\.(weight|bias)": 0,
    r"blocks\.\d+\.((norm|ls)[12]\.\w+|attn\.proj\.(weight|bias))|attn_pool\.proj\.(weight|bias)": 0,
    rf"{_MLP}\.fc2\.(weight|bias)": 0,
    rf"(blocks\.\d+\.attn\.qkv|attn_pool\.(q|kv)|{_MLP}\.fc1(_g|_x)?|head|head_dist)\.weight": 1,
    rf"(blocks\.\d+\.attn\.qkv|attn_pool\.(q|kv)|{_MLP}\.fc1(_g|_x)?|head|head_dist)\.bias": None,
    rf"(blocks\.\d+\.attn\.(q_norm|k_norm|norm)|attn_pool\.(q_norm|k_norm)|{_MLP}\.norm)\.(weight|bias)": None,
}
OUTPUT = "output"


def embed_axes(model: nn.Module) -> dict[str, int | None] | None:
    """For each parameter of ``model``, and for its "output", the axis of the embedding channels.

    None when a name is not one of timm's ViT, or when the axes disagree about the number of channels.
    """
    parameters = dict(model.named_parameters())
    axes: dict[str, int | None] = {OUTPUT: None if "head.weight" in parameters else -1}
    for name in parameters:
        found = [axis for pattern, axis in _AXES.items() if re.fullmatch(pattern, name)]
        if not found:
            return None
        axes[name] = found[0]
    sizes = {p.shape[axis] for name, p in parameters.items() if (axis := axes[name]) is not None}
    return axes if len(sizes) == 1 else None


def orders(model: nn.Module, axes: Mapping[str, int | None], count: int) -> list[Tensor]:
    """``count`` fixed orders of the embedding channels; the first is the model's own."""
    width = next(p.shape[axis] for name, p in model.named_parameters() if (axis := axes[name]) is not None)
    drawn = (torch.randperm(width, generator=torch.Generator().manual_seed(seed)) for seed in range(1, count))
    return [torch.arange(width), *drawn]


def relabel(value: Tensor, axis: int | None, order: Tensor) -> Tensor:
    return value if axis is None else value.index_select(axis, order.to(value.device))


def relabelled(model: nn.Module, axes: Mapping[str, int | None], order: Tensor) -> nn.Module:
    """A copy of ``model`` whose embedding channel ``i`` is channel ``order[i]`` of ``model``."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(relabel(parameter, axes[name], order))
    return model
