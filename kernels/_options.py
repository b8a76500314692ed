"""What a call of attention may ask for beyond the plain form, as the general kernels take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._qk import Preparation


@dataclass(frozen=True)
class Options:
    """What a call asks for beyond softmax(scale * q k^T) v.

    attn_mask     broadcastable to (B, H, Nq, Nk): bool (True takes part) or float (added)
    dropout_seed  int64, one value; given with dropout_p > 0
    cu_seqlens    (S + 1,) int32 or int64: sample s has the rows from cu_seqlens[s] to cu_seqlens[s + 1] of tensors
                  (1, H, T, D), at most max_seqlen of them
    preparation   of q and k; with cu_seqlens the table has a row for each of the T rows
    """

    scale: float
    attn_mask: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    preparation: Preparation = Preparation()  # noqa: RUF009 - frozen

    @property
    def longest(self) -> int | None:
        return None if self.cu_seqlens is None else self.max_seqlen

    def readable(self) -> Options:
        """The same with its tensors as the kernels read them."""
        mask = self.attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        elif mask is not None and mask.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            mask = mask.float()
        return replace(self, attn_mask=mask, preparation=self.preparation.readable())

    def tensors(self) -> dict[str, Tensor | None]:
        """What the kernels take of it, by the names of their parameters."""
        prepared = self.preparation
        return {
            "mask": self.attn_mask,
            "seed": self.dropout_seed if self.dropout_p else None,
            "cu": self.cu_seqlens,
            "qw": prepared.q_weight,
            "qb": prepared.q_bias,
            "kw": prepared.k_weight,
            "kb": prepared.k_bias,
            "rope": prepared.rope,
        }

    def numbers(self) -> tuple:
        """All else that a launch depends on."""
        prepared = self.preparation
        numbers = (self.scale, self.is_causal, self.dropout_p, self.max_seqlen)
        return *numbers, prepared.norm, prepared.q_eps, prepared.k_eps, prepared.num_prefix, prepared.half
