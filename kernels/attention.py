"""Multi-head attention, forward and backward, on q, k and v where they lie (strided views of a packed projection).

Meaning: fastvit.reference.attention. Source of the idea: "FlashAttention-2" (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import attention_settings
from ._math import cast, dot

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``out`` and ``lse``, the log of each query's sum of exp(scale * q k^T).

    q        (B, H, Nq, D)  float16 | bfloat16 | float32; D a multiple of 8 from 32 to 128
    k, v     (B, H, Nk, D)
    scale    not negative
    out      (B, H, Nq, D)  dtype of q, a view of a contiguous (B, Nq, H, D) tensor
    lse      (B, H, Nq)     float32
    """
    _check(q, scale)
    q, k, v = (_rows(t) for t in (q, k, v))
    batch, heads, nq, dim = q.shape
    out = q.new_empty(batch, nq, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, nq, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    nk = k.shape[2]
    settings = attention_settings("fwd", q.dtype, dim)
    strides, unit = _strides(q, k, v, out)
    grid = (triton.cdiv(nq, settings.block_m) * batch * heads,)
    _attention_fwd_kernel[grid](
        q, k, v, out, lse, *strides, scale, heads, nq, nk,
        D=dim, UNIT=unit, **settings.constexprs(), num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of ``attention_fwd`` into dq, dk and dv, e.g. views of one packed (B, N, 3, H, D) tensor."""
    _check(q, scale)
    for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
        if grad.stride(-1) != 1:
            raise ValueError(f"attention: {name} has stride {grad.stride(-1)} in its last dimension, expected 1")
    dout, q, k, v, out = (_rows(t) for t in (dout, q, k, v, out))
    batch, heads, nq, dim = q.shape
    if q.numel() == 0:
        return
    nk = k.shape[2]
    delta = torch.empty_like(lse)
    # dQ goes first: it meets every row of dout and out, and leaves delta = sum(dout * out) for dK and dV
    settings = attention_settings("bwd_dq", q.dtype, dim)
    strides, unit = _strides(q, k, v, out, dout, dq)
    _attention_bwd_dq_kernel[(triton.cdiv(nq, settings.block_m) * batch * heads,)](
        q, k, v, out, dout, lse, delta, dq, *strides, scale, heads, nq, nk,
        D=dim, UNIT=unit, **settings.constexprs(), num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
    settings = attention_settings("bwd_dkv", q.dtype, dim)
    strides, unit = _strides(q, k, v, dout, dk, dv)
    _attention_bwd_dkv_kernel[(triton.cdiv(nk, settings.block_n) * batch * heads,)](
        q, k, v, dout, lse, delta, dk, dv, *strides, scale, heads, nq, nk,
        D=dim, UNIT=unit, **settings.constexprs(), num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip


def _check(q: Tensor, scale: float) -> None:
    if not scale >= 0:
        raise ValueError(f"attention: scale is {scale}, expected a number >= 0")
    if q.shape[-1] % 8 or not 32 <= q.shape[-1] <= 128:
        raise ValueError(f"attention: q has head dim {q.shape[-1]}, expected a multiple of 8 from 32 to 128")


def _rows(tensor: Tensor) -> Tensor:
    """The kernels read each row of D values as one run of memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of batch, head and token, counted in units of 8 elements if all allow it: then rows load in 16 bytes."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


@triton.jit
def _split_pid(length, H, BLOCK: tl.constexpr):
    """(batch, head, first row) of this program; batch and head in int64, as their offsets can pass 2^31."""
    tiles = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    pid_bh = pid // tiles
    return (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64), (pid % tiles) * BLOCK


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, UNIT: tl.constexpr):
    return ptr + (b * stride_b + h * stride_h) * UNIT


@triton.jit
def _tile(ptr, offs_n, stride_n, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (rows, BLOCK_D) of a head's rows."""
    return ptr + (offs_n[:, None] * stride_n * UNIT + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _inside(offs_n, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask (rows, BLOCK_D): real rows and real columns."""
    mask = offs_n[:, None] < length
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    return mask


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, block by block, with a running row maximum."""
    b, h, start_m = _split_pid(Nq, H, BLOCK_M)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = _inside(offs_m, Nq, D, BLOCK_D)
    q = tl.load(_tile(q_ptr, offs_m, stride_qn, D, UNIT, BLOCK_D), mask=mask_m, other=0.0)
    scale_log2 = scale * LOG2_E
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = _inside(offs_n, Nk, D, BLOCK_D)
        k = tl.load(_tile(k_ptr, offs_n, stride_kn, D, UNIT, BLOCK_D), mask=mask_n, other=0.0)
        v = tl.load(_tile(v_ptr, offs_n, stride_vn, D, UNIT, BLOCK_D), mask=mask_n, other=0.0)
        scores = dot(q, k.T)
        # the last key block is ragged (N = 197): padded keys must not enter the row maximum
        scores = tl.where(offs_n[None, :] < Nk, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
        shrink = tl.exp2((row_max - new_max) * scale_log2)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = dot(cast(p, v.dtype), v, acc * shrink[:, None])
        row_max = new_max
    out = acc / row_sum[:, None]
    tl.store(_tile(out_ptr, offs_m, stride_on, D, UNIT, BLOCK_D), cast(out, q.dtype), mask=mask_m)
    lse = row_max * scale + tl.log2(row_sum) * LN_2
    tl.store(lse_ptr + (b * H + h) * Nq + offs_m, lse, mask=offs_m < Nq)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries: delta = sum(dout * out), then dQ = scale * dS K with dS = P * (dout V^T - delta)."""
    b, h, start_m = _split_pid(Nq, H, BLOCK_M)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = _inside(offs_m, Nq, D, BLOCK_D)
    offs_bh = (b * H + h) * Nq + offs_m
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    out = tl.load(_tile(out_ptr, offs_m, stride_on, D, UNIT, BLOCK_D), mask=mask_m, other=0.0)
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT)
    dout = tl.load(_tile(dout_ptr, offs_m, stride_don, D, UNIT, BLOCK_D), mask=mask_m, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + offs_bh, delta, mask=offs_m < Nq)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    q = tl.load(_tile(q_ptr, offs_m, stride_qn, D, UNIT, BLOCK_D), mask=mask_m, other=0.0)
    scale_log2 = scale * LOG2_E
    lse_log2 = tl.load(lse_ptr + offs_bh, mask=offs_m < Nq, other=0.0) * LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = _inside(offs_n, Nk, D, BLOCK_D)
        k = tl.load(_tile(k_ptr, offs_n, stride_kn, D, UNIT, BLOCK_D), mask=mask_n, other=0.0)
        v = tl.load(_tile(v_ptr, offs_n, stride_vn, D, UNIT, BLOCK_D), mask=mask_n, other=0.0)
        # a padded key scores 0, far above a very negative lse: without the mask its p overflows
        scores = tl.where(offs_n[None, :] < Nk, dot(q, k.T), float("-inf"))
        p = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        ds = p * (dot(dout, v.T) - delta[:, None])
        acc = dot(cast(ds, k.dtype), k, acc)
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, UNIT)
    tl.store(_tile(dq_ptr, offs_m, stride_dqn, D, UNIT, BLOCK_D), cast(acc * scale, q.dtype), mask=mask_m)


@triton.jit
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys against all queries: dV = P^T dout, dK = scale * dS^T Q. Rows are keys, so P^T needs no transpose."""
    b, h, start_n = _split_pid(Nk, H, BLOCK_N)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = _inside(offs_n, Nk, D, BLOCK_D)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    k = tl.load(_tile(k_ptr, offs_n, stride_kn, D, UNIT, BLOCK_D), mask=mask_n, other=0.0)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    v = tl.load(_tile(v_ptr, offs_n, stride_vn, D, UNIT, BLOCK_D), mask=mask_n, other=0.0)
    scale_log2 = scale * LOG2_E
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_m in range(0, Nq, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = _inside(offs_m, Nq, D, BLOCK_D)
        q = tl.load(_tile(q_ptr, offs_m, stride_qn, D, UNIT, BLOCK_D), mask=mask_m, other=0.0)
        dout = tl.load(_tile(dout_ptr, offs_m, stride_don, D, UNIT, BLOCK_D), mask=mask_m, other=0.0)
        offs_bh = (b * H + h) * Nq + offs_m
        # a padded query has lse = inf, so p = 0
        lse_log2 = tl.load(lse_ptr + offs_bh, mask=offs_m < Nq, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + offs_bh, mask=offs_m < Nq, other=0.0)
        p = tl.exp2(dot(k, q.T) * scale_log2 - lse_log2[None, :])
        dv = dot(cast(p, dout.dtype), dout, dv)
        ds = p * (dot(v, dout.T) - delta[None, :])
        dk = dot(cast(ds, q.dtype), q, dk)
    dk_ptr = _head(dk_ptr, b, h, stride_dkb, stride_dkh, UNIT)
    tl.store(_tile(dk_ptr, offs_n, stride_dkn, D, UNIT, BLOCK_D), cast(dk * scale, k.dtype), mask=mask_n)
    dv_ptr = _head(dv_ptr, b, h, stride_dvb, stride_dvh, UNIT)
    tl.store(_tile(dv_ptr, offs_n, stride_dvn, D, UNIT, BLOCK_D), cast(dv, k.dtype), mask=mask_n)
