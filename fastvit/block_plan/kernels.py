"""What a block's node runs: the kernels behind the ops, forward and backward, on tensors alone.

Hopper has both in one call each (``hopper``); this is the same for every backend, and what is left to it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import _register
from ..ops.attention import as_heads, write_gradients
from . import hopper
from .plan import class_token_heads, class_token_linears


class Step(NamedTuple):
    """What is the same for all calls of one kind."""

    class_token: bool
    """Whether token 0 alone is wanted, as keys and values are of all."""
    num_heads: int
    scale: float
    eps1: float
    eps2: float
    act: str
    memory: str
    dtype: torch.dtype | None
    """Autocast's."""
    caches: tuple[bool, bool, bool]
    """Whether packs of qkv's weight, the projection's and the MLP's are kept."""
    backends: tuple[str, str, str, str]
    """Of LayerNorm and linear layer, attention, projection, MLP."""

    @property
    def kept(self) -> int:
        """How many tensors ``forward`` returns for the backward."""
        return 12 if self.class_token else 9


def forward(step: Step, row_scale1: Tensor | None, row_scale2: Tensor | None, x: Tensor, weights: Any) -> tuple:
    """What comes out, and what the backward reads: the attention's, then four tensors of the MLP.

    weights  ``plan.parameters`` of the block, as the kernels take them
    """
    if not step.class_token:
        in_one = hopper.forward(step, (row_scale1, row_scale2), x, weights)
        if in_one is not None:
            return tuple(in_one)
    norm_and_qkv, projection, scale1, mlp, scale2 = split(weights)
    attend, residual = (_attend_class_token, x[:, :1]) if step.class_token else (_attend, x)
    saved = attend(step, x, norm_and_qkv)
    branch = (saved[-2], *projection, residual, scale1, row_scale1)
    middle = _run("linear_residual_fwd")(*branch, step.caches[1], step.backends[2])
    options = (step.act, step.eps2, True, step.memory == "default", step.caches[2], step.backends[3])
    out, mean2, rstd2, h = _run("layernorm_mlp_fwd")(middle, *mlp, scale2, row_scale2, *options)
    return (out, *saved, middle, mean2, rstd2, h)


def backward(
    step: Step, dout: Tensor, x: Tensor, saved: Any, row_scales: Any, weights: Any, wants: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of all parameters, by the ops' backwards. What autocast had cast is PyTorch's to cast back."""
    if not step.class_token:
        in_one = hopper.backward(step, dout, x, saved, row_scales, weights, wants)
        if in_one is not None:
            return tuple(in_one)
    *of_attention, middle, mean2, rstd2, h = saved
    norm_and_qkv, projection, scale1, mlp, scale2 = split(weights)
    wants_attention, wants_middle = any(wants[:5]), any(wants[:8])

    branch = (*mlp, scale2, row_scales[1], step.act, step.eps2, True, [wants_middle, *wants[8:]], step.backends[3])
    dmiddle, *mlp_grads = _run("layernorm_mlp_bwd")(dout, middle, mean2, rstd2, h, *branch)
    if not wants_middle:
        return (*(None,) * 8, *mlp_grads)
    branch = (*projection, scale1, row_scales[0], [wants_attention, *wants[5:8]], step.backends[2])
    dattended, *projection_grads = _run("linear_residual_bwd")(dmiddle, of_attention[-2], *branch)
    if not wants_attention:
        return (*(None,) * 5, *projection_grads, *mlp_grads)
    attend = _attend_class_token_backward if step.class_token else _attend_backward
    grads = attend(step, dattended, dmiddle, x, norm_and_qkv, of_attention, list(wants[:5]))
    return (*grads, *projection_grads, *mlp_grads)


def split(weights: Any) -> tuple[Any, ...]:
    """``parameters`` as those of norm1 and qkv, of the projection and its scale, of norm2, fc1 and fc2 and theirs."""
    return weights[:4], weights[4:6], weights[6], weights[7:13], weights[13]


def _run(name: str) -> Callable[..., Any]:
    return _register.IMPLS[name]


def _attend(step: Step, x: Tensor, norm_and_qkv: Any) -> tuple[Tensor, ...]:
    """LayerNorm's statistics, qkv, the attention's result and its statistics."""
    linear = (x, *norm_and_qkv, step.eps1, step.caches[0], step.backends[0])
    qkv, mean, rstd = _run("layernorm_linear_fwd")(*linear)
    return mean, rstd, qkv, *_run("attention_packed_fwd")(qkv, step.num_heads, step.scale, step.backends[1])


def _attend_backward(
    step: Step, dattended: Tensor, dmiddle: Tensor, x: Tensor, norm_and_qkv: Any, saved: Any, mask: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, with the residual connection's ``dmiddle``, and of ``norm_and_qkv``."""
    mean, rstd, *heads = saved
    dqkv = _run("attention_packed_bwd")(dattended, *heads, step.num_heads, step.scale, step.backends[1])
    options = (dmiddle, mask, step.eps1, step.backends[0])
    return _run("layernorm_linear_bwd")(dqkv, x, mean, rstd, *norm_and_qkv, *options)


def _attend_class_token(step: Step, x: Tensor, norm_and_qkv: Any) -> tuple[Tensor, ...]:
    """LayerNorm's statistics of token 0 and of all, its q, all k and v, the attention's result and its statistics."""
    options = (step.eps1, step.caches[0], step.backends[0])
    linears = class_token_linears(x, norm_and_qkv[:2], norm_and_qkv[2:])
    (q, *of_first), (kv, *of_all) = (_run("layernorm_linear_fwd")(*linear, *options) for linear in linears)
    heads = class_token_heads(q, kv, step.num_heads)
    attended, statistics = _run("attention_fwd")(*heads, None, False, step.scale, step.backends[1])
    return (*of_first, *of_all, q, kv, attended.transpose(1, 2).flatten(2), statistics)


def _attend_class_token_backward(
    step: Step, dattended: Tensor, dmiddle: Tensor, x: Tensor, norm_and_qkv: Any, saved: Any, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """As ``_attend_backward``; k's and v's gradients are written side by side, as their projection reads them."""
    *statistics, q, kv, attended, softmax = saved
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    heads, grads = class_token_heads(q, kv, step.num_heads), class_token_heads(dq, dkv, step.num_heads)
    given = (*heads, None, False, as_heads(attended, step.num_heads), softmax, step.scale)
    if q.numel():
        write_gradients(step.backends[1], as_heads(dattended, step.num_heads), *given, *grads)
    linears = class_token_linears(x, norm_and_qkv[:2], norm_and_qkv[2:])
    options = (None, mask, step.eps1, step.backends[0])
    of_q, of_kv = (
        _run("layernorm_linear_bwd")(dout, linear[0], mean, rstd, *linear[1:], *options)
        for dout, linear, mean, rstd in zip((dq, dkv), linears, statistics[::2], statistics[1::2], strict=True)
    )
    if mask[0]:
        of_kv[0][:, :1].add_(dmiddle).add_(of_q[0])
    sums = (torch.add if at < 3 else _joined for at in range(1, 5))  # of the norm, of the linear layer
    both = zip(sums, of_q[1:], of_kv[1:], mask[1:], strict=True)
    return (of_kv[0], *(combine(first, all_) if wanted else None for combine, first, all_, wanted in both))


def _joined(first: Tensor, others: Tensor) -> Tensor:
    return torch.cat((first, others))
