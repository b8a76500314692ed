"""What the attention ops share about normalised and rotated q and k: the contract, and their place in the schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import HeadNorm, Rope
from . import _contract

WEIGHTS = ("q_weight", "q_bias", "k_weight", "k_bias")
NAMES = (*WEIGHTS, "norm", "q_eps", "k_eps", "rope", "num_prefix", "half")
SCHEMA = (
    "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, str norm, float q_eps, float k_eps,"
    " Tensor? rope, int num_prefix, bool half"
)


class Flat(NamedTuple):
    """q_norm, k_norm and rope as a schema can hold them; the fields of kernels' ``Preparation``, in its order."""

    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    norm: str = ""
    q_eps: float = 1e-6
    k_eps: float = 1e-6
    rope: Tensor | None = None
    num_prefix: int = 0
    half: bool = False


def flat(q_norm: HeadNorm | None, k_norm: HeadNorm | None, rope: Rope | None) -> Flat:
    """Of norms that ``fits`` let through: both or none, and of one kind."""
    norms: dict[str, Any] = {}
    if q_norm is not None and k_norm is not None:
        norms = {"q_weight": q_norm.weight, "q_bias": q_norm.bias, "k_weight": k_norm.weight, "k_bias": k_norm.bias}
        norms |= {"norm": "rms" if q_norm.rms else "layer", "q_eps": q_norm.eps, "k_eps": k_norm.eps}
    rotation: dict[str, Any] = (
        {} if rope is None else {"rope": rope.table, "num_prefix": rope.num_prefix, "half": rope.half}
    )
    return Flat(**norms, **rotation)


def unflat(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse: q_norm, k_norm and rope of ``fastvit.reference.attention``."""
    norm, rope = values["norm"], values["rope"]
    return {
        "q_norm": HeadNorm(values["q_weight"], values["q_bias"], values["q_eps"], norm == "rms") if norm else None,
        "k_norm": HeadNorm(values["k_weight"], values["k_bias"], values["k_eps"], norm == "rms") if norm else None,
        "rope": None if rope is None else Rope(rope, values["num_prefix"], values["half"]),
    }


def check(
    op: str,
    q: Tensor,
    lengths: tuple[int, int],
    q_norm: HeadNorm | None,
    k_norm: HeadNorm | None,
    rope: Rope | None,
    letters: str = "Nk - num_prefix",
) -> None:
    """The contract of the three; ``q`` is (B, H, Nq, D) and ``lengths`` are (Nq, Nk)."""
    for name, norm in {"q_norm": q_norm, "k_norm": k_norm}.items():
        if norm is None:
            continue
        tensors = {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        _contract.check_together(op, "q", q, **tensors)
        for label, tensor in tensors.items():
            _contract.check_shape(op, label, tensor, (q.shape[-1],), "like the head dim of q")
        if norm.rms and norm.bias is not None:
            raise ValueError(f"{op}: {name}.bias has shape {tuple(norm.bias.shape)}, expected none with rms")
    if rope is not None:
        _check_rope(op, q, lengths, rope, letters)


def _check_rope(op: str, q: Tensor, lengths: tuple[int, int], rope: Rope, letters: str) -> None:
    table, (queries, keys) = rope.table, lengths
    _contract.check_together(op, "q", q, **{"rope.table": table})
    if not 0 <= rope.num_prefix <= keys:
        raise ValueError(f"{op}: rope.num_prefix is {rope.num_prefix}, expected 0 to {keys}, the number of keys")
    if queries > keys:
        raise ValueError(f"{op}: q has {queries} tokens, expected at most {keys} like k: rope places both alike")
    expected = (q.shape[0], q.shape[1], keys - rope.num_prefix, 2 * q.shape[3])
    padded = (1,) * (4 - table.dim()) + tuple(table.shape)
    leading = zip(padded[:2], expected[:2], strict=True)
    if len(padded) != 4 or padded[2:] != expected[2:] or any(have not in (1, want) for have, want in leading):
        raise ValueError(
            f"{op}: rope.table has shape {tuple(table.shape)}, expected ({letters}, 2 * D) = {expected[2:]}"
            f" or one broadcastable to {expected}"
        )


def fits(q_norm: HeadNorm | None, k_norm: HeadNorm | None, rope: Rope | None) -> bool:
    """Can a kernel take them? Else stock PyTorch prepares q and k."""
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and k_norm is not None and q_norm.rms != k_norm.rms):
        return False
    return rope is None or not rope.table.requires_grad


def why_not_triton(q_norm: HeadNorm | None, k_norm: HeadNorm | None, rope: Rope | None) -> list[str]:
    reasons = []
    if (q_norm is None) != (k_norm is None):
        missing = "k_norm" if k_norm is None else "q_norm"
        reasons.append(f"{missing} is None beside a norm of the other, triton takes both or none")
    if q_norm is not None and k_norm is not None and q_norm.rms != k_norm.rms:
        reasons.append("q_norm and k_norm are of different kinds, triton takes two LayerNorms or two RMSNorms")
    for name, norm in {"q_norm": q_norm, "k_norm": k_norm}.items():
        if norm is not None and not norm.eps > 0:
            reasons.append(f"{name}.eps is {norm.eps}, triton takes one above 0")
    if rope is not None and rope.table.requires_grad:
        reasons.append("rope.table requires a gradient, triton gives none")
    return reasons


def weight_gradients(sums: tuple[Tensor, Tensor], weights: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients of WEIGHTS from the kernels' (2, D) sums of q's norm and of k's; empty for what is not there."""
    return tuple(
        total.new_empty(0) if weight is None else total.to(weight.dtype, copy=True)
        for total, weight in zip((*sums[0], *sums[1]), weights, strict=True)
    )


def fake_weight_gradients(some: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(
        some.new_empty(0, dtype=torch.float32) if weight is None else torch.empty_like(weight) for weight in weights
    )
