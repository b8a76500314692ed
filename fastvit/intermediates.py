"""The outputs of a ViT's inner blocks, as feature maps or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .norm_act import one_of


class IntermediateLayers(nn.Module):
    """Methods of a ViT that read or keep only some of its blocks."""

    blocks: Any
    norm: nn.Module
    fc_norm: nn.Module
    patch_embed: Any
    num_prefix_tokens: int

    def _embed(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _run_block(
        self, block: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The outputs of some blocks beside the final tokens.

        indices               which blocks: the last n, a sequence (negative from the end), or all
        return_prefix_tokens  also the prefix tokens of those blocks
        norm                  put the final norm on each
        stop_early            leave out the blocks after the last one wanted
        output_fmt            "NCHW" (B, E, rows, columns) or "NLC" (B, L, E)
        returns               (tokens, intermediates); intermediates alone with ``intermediates_only``; with
                              ``output_dict`` a dict: image_features, image_intermediates, image_intermediates_prefix
        """
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        wanted = _block_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = self._embed(x)
        blocks = list(self.blocks)[: max(wanted) + 1] if stop_early else self.blocks
        taken = []
        for i, block in enumerate(blocks):
            x = self._run_block(block, x, attn_mask, is_causal)
            if i in wanted:
                taken.append(self.norm(x) if norm else x)
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        patches = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            patches = [torch.unflatten(tokens.transpose(1, 2), 2, grid).contiguous() for tokens in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list:
        """DINO's name for ``forward_intermediates``, intermediates only."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted, and the norm and the head if asked; returns the indices kept."""
        wanted = _block_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted


def _block_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Absolute block numbers: all for None, the last n for an int, else each one, negative from the end."""
    if indices is None or isinstance(indices, int):
        last = depth if indices is None else indices
        if not 0 < last <= depth:
            raise ValueError(f"indices is {last}, expected 1 to {depth} blocks")
        return list(range(depth - last, depth))
    wanted = [depth + i if i < 0 else i for i in indices]
    if not wanted or not all(0 <= i < depth for i in wanted):
        raise ValueError(f"indices is {list(indices)}, expected blocks from {-depth} to {depth - 1}")
    return wanted
