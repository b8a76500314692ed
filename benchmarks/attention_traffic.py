"""Attention's reads and writes without its arithmetic: what the access pattern alone costs.

``out = q + k + v`` by a program for each head, or each pair of heads. On a packed (B, N, 3 * H * D) projection the rows
of a head lie 3 * H * D values apart; beside it q, k and v whose heads are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _traffic_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_b, stride_h, stride_n, stride_ob, stride_oh, stride_on, groups, N,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // groups, tl.program_id(0) % groups
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    offsets = b.to(tl.int64) * stride_b + h * stride_h + rows * stride_n + columns
    total = tl.load(q_ptr + offsets, mask=rows < N, other=0.0).to(tl.float32)
    total += tl.load(k_ptr + offsets, mask=rows < N, other=0.0)
    total += tl.load(v_ptr + offsets, mask=rows < N, other=0.0)
    offsets = b.to(tl.int64) * stride_ob + h * stride_oh + rows * stride_on + columns
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=rows < N)


def traffic(q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: int = 1) -> None:
    """Write q + k + v into ``out``, all (B, H, N, D) with D values side by side, q, k and v of the same strides.

    heads   of a program; more than one where the heads of a token lie side by side
    """
    batch, count, tokens, dim = q.shape
    groups = count // heads
    strides = [stride * step for t in (q, out) for stride, step in zip(t.stride(), (1, heads, 1), strict=False)]
    rows = triton.next_power_of_2(tokens)
    _traffic_kernel[(batch * groups,)](
        q, k, v, out, *strides, groups, tokens, COLUMNS=heads * dim, ROWS=rows, num_warps=4 * heads
    )


def forms(batch: int, heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of ``traffic`` by the name of what they show."""
    packed = torch.randn(batch, tokens, 3, heads, dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    out = torch.empty(batch, tokens, heads, dim, device=device, dtype=dtype).transpose(1, 2)
    apart = packed.contiguous()
    return {
        "packed": (*packed.unbind(0), out),
        "packed-by-two": (*packed.unbind(0), out, 2),
        "contiguous": (*apart.unbind(0), torch.empty_like(apart[0])),
    }
