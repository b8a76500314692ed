"""A whole ViT with timm's attribute names: one embedding op, and the last block for the class token alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_state

from ..fused import class_token_block_forward, embed_forward, is_watched, kind_of, why_not_fused_embed, why_not_skip
from ._override import is_patched, stock_forward

_MIXERS = ("Attention", "Block", "PatchEmbed", "Conv2d")
HOMES = ("timm.models.vision_transformer", "fastvit.model")


def vision_transformer_forward(vit: Any, x: Tensor, *args: Any, cls_only_last_block: bool, **kwargs: Any) -> Tensor:
    """timm's ``forward(x, attn_mask=None, is_causal=False)``; masks and what is overridden take the class's own."""
    masked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
    if masked or why_not_whole(vit):
        return stock_forward(vit, x, *args, **kwargs)
    x = vit.norm_pre(vit.patch_drop(_embed(vit, x)))
    if cls_only_last_block and not why_not_class_token_only(vit):
        *blocks, last = vit.blocks
        for block in blocks:
            x = block(x)
        x = class_token_block_forward(last, x)
    else:
        x = vit.blocks(x)
    return vit.forward_head(vit.norm(x))


def _embed(vit: Any, images: Tensor) -> Tensor:
    if why_not_embed(vit) or not _takes(vit.patch_embed.proj.weight, images):
        return vit._pos_embed(vit.patch_embed(images))
    return embed_forward(vit, images)


def _takes(weight: Tensor, images: Tensor) -> bool:
    """Whether stock PyTorch convolves ``images``: it refuses pixels, and floats of another dtype than the weight."""
    if not images.is_floating_point():
        return False
    return images.dtype == weight.dtype or torch.is_autocast_enabled(images.device.type)


def why_not_whole(vit: Any) -> list[str]:
    """Reasons why the model must be run by its class's own ``forward`` (its blocks are fast all the same)."""
    reasons = _why_not_own(vit, "forward_features")
    if vit.grad_checkpointing:
        reasons.append("gradient checkpointing is on")
    if module_state._has_any_global_hook():
        reasons.append("hooks are registered for every module, which a fused op would not call")
    return reasons


def why_not_embed(vit: Any) -> list[str]:
    """Reasons why patches, prefix tokens and positions are not one op."""
    return _why_not_own(vit, "_pos_embed") or why_not_fused_embed(vit)


def why_not_class_token_only(vit: Any) -> list[str]:
    """Reasons why the last block runs for all tokens: somebody reads them, or a module may mix them."""
    if vit.global_pool != "token" or vit.attn_pool is not None:
        return [f"the head reads all tokens (global_pool={vit.global_pool!r})"]
    reasons = _why_not_own(vit, "forward_head", "pool") + why_not_skip(vit.norm, "norm", "LayerNorm", "Identity")
    if not len(vit.blocks):
        return [*reasons, "there are no blocks"]
    last = vit.blocks[-1]
    if is_watched(vit.blocks) or "forward" in vit.blocks.__dict__:
        reasons.append("blocks has hooks or another forward")
    if is_patched(last):
        reasons.append("the last block's forward was replaced on this instance")
    return reasons or why_not_one_token(last)


def why_not_one_token(block: nn.Module) -> list[str]:
    """Reasons why ``block`` must see all tokens: a hook, an unknown module, or dropout (its draws would differ)."""
    reasons = []
    for name, module in block.named_modules():
        kind = kind_of(module)
        if not kind or (kind in _MIXERS and name not in ("", "attn")):
            reasons.append(f"{name or 'the last block'} is a {type(module).__qualname__}, which may mix tokens")
        elif is_watched(module):
            reasons.append(f"{name or 'the last block'} has hooks")
        elif kind == "Dropout" and module.training and module.p > 0:
            reasons.append(f"{name} is active (p={module.p})")
        elif kind == "Attention" and not module.fused_attn:
            reasons.append(f"{name}.fused_attn is False, so the attention weights are wanted")
    return reasons


def _why_not_own(vit: Any, *methods: str) -> list[str]:
    """Reasons when a subclass or somebody else changed what ``methods`` do."""
    reasons = []
    for method in methods:
        function = getattr(type(vit), method)
        if function.__module__ not in HOMES or method in vit.__dict__:
            reasons.append(f"{method} is not {' or '.join(HOMES)}'s own")
    return reasons
