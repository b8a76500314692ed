"""Multi-head attention, forward and backward, on q, k and v where they lie (strided views of a packed projection).

Two forms of each pass. The short form (half precision, few keys: ViT at 224 pixels) gives a program a whole head and
keeps its keys on the chip: the row maximum is exact, nothing is rescaled, and the backward computes every score once
for dQ, dK and dV. The streaming form walks over blocks of keys and takes any length and dtype.

Meaning: fastvit.reference.attention. Source of the ideas: "FlashAttention-2" (Dao, 2023).
"""

# ruff: noqa: RUF005 - Triton knows no (*parts, part)
from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attend import attend_at_once, attend_by_tile
from ._configs import AotCase, AttentionSettings, Limits, attention_settings
from ._launch import Launch, Replay, facts, limits, made, run, run_on, unit_strides
from ._math import cast
from ._softmax import LOG2_E, load_statistics, probabilities, save_statistics, statistic_rows, weights
from ._tiles import before, inner, load, load_tiles, outer, outer_t, row_sum, scaled, store, zeros, zeros_t

# one binary serves every batch, length and stride: alignment is told by UNIT
_RUNTIME = ["scale", "H", "Nq", "Nk", "blocks"] + [
    f"stride_{tensor}{axis}" for tensor, axis in product(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "bhn")
]


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``out`` and ``lse``, the log of each query's sum of exp(scale * q k^T), for the backward.

    q        (B, H, Nq, D)  float16 | bfloat16 | float32; D a multiple of 8 from 32 to 128
    k, v     (B, H, Nk, D)  dtype of q
    scale    positive
    out      (B, H, Nq, D)  dtype of q, a view of a contiguous (B, Nq, H, D) tensor
    lse      (B, H, Nq)     float32; of float32 inputs (2, B, H, Nq): the largest q k^T, log2 of the sum beside it
    """
    _check(q, scale)
    q, k, v = (_rows(t) for t in (q, k, v))
    batch, heads, nq, dim = q.shape
    out = q.new_empty(batch, nq, heads, dim).transpose(1, 2)
    lse = new_statistics(q, q.shape[:3])
    if q.numel():
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        run_on(tensors, ("attention_fwd", scale), lambda: [_fwd_launch(*tensors.values(), scale, limits(q.device))])
    return out, lse


def attention_packed_fwd(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """``attention_fwd`` of the views of a packed (B, N, 3 * H * D) projection; out is (B, N, H * D)."""
    batch, tokens, packed = qkv.shape
    width, dim = packed // 3, packed // (3 * num_heads)
    out, lse = _packed_results(qkv, num_heads)
    address, step = qkv.data_ptr(), width * qkv.dtype.itemsize

    def build() -> list[Launch]:
        q, k, v = qkv.unflatten(-1, (3, num_heads, dim)).permute(2, 0, 3, 1, 4).unbind(0)
        _check(q, scale)
        heads = out.view(batch, tokens, num_heads, dim).transpose(1, 2)
        return [_fwd_launch(q, k, v, heads, lse, scale, limits(q.device))]

    key = _packed_key(num_heads, scale, qkv, out, lse)
    pointers = {"q": address, "k": address + step, "v": address + 2 * step}
    run(key, qkv.device, pointers | {"out": out.data_ptr(), "lse": lse.data_ptr()}, build)
    return out, lse


def made_packed_fwd(qkv: Tensor, num_heads: int, scale: float) -> Replay | None:
    """The launch of ``attention_packed_fwd``, where one for such a projection was made before."""
    return next(iter(made(_packed_key(num_heads, scale, qkv, *_packed_results(qkv, num_heads)))), None)


def _packed_results(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    return qkv.new_empty(batch, tokens, packed // 3), new_statistics(qkv, (batch, num_heads, tokens))


def _packed_key(num_heads: int, scale: float, *tensors: Tensor) -> tuple:
    return "attention_packed_fwd", num_heads, scale, facts(tensors)


def reads_packed(qkv: Tensor) -> bool:
    """Whether ``attention_packed_fwd`` reads it in place."""
    return qkv.stride(2) == 1 and qkv.shape[1] * qkv.stride(1) < 2**31 and qkv.numel() > 0


def new_statistics(q: Tensor, queries: tuple[int, ...]) -> Tensor:
    """Room for what the forward saves of each of its (B, H, N) queries."""
    return q.new_empty(queries if q.dtype.itemsize == 2 else (2, *queries), dtype=torch.float32)


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
    """Write the gradients of ``attention_fwd`` into dq, dk and dv, e.g. views of one packed (B, N, 3, H, D) tensor.

    Every sum has one order and one owner, so results are the same from run to run.
    """
    _check(q, scale)
    for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
        if grad.stride(-1) != 1:
            raise ValueError(f"attention: {name} has stride {grad.stride(-1)} in its last dimension, expected 1")
    dout, q, k, v, out = (_rows(t) for t in (dout, q, k, v, out))
    if q.numel():
        delta = lse.new_empty(q.shape[:3])
        tensors = dict(zip(_BWD_TENSORS, (dout, q, k, v, out, lse, dq, dk, dv, delta), strict=True))
        arguments = (dout, q, k, v, out, lse, scale, dq, dk, dv, limits(q.device), delta)
        run_on(tensors, ("attention_bwd", scale), lambda: _bwd_launches(*arguments))


_BWD_TENSORS = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv", "delta")
DQ_POINTERS = ("q", "k", "v", "out", "dout", "dq", "lse", "delta")
DKV_POINTERS = ("q", "k", "v", "dout", "dk", "dv", "lse", "delta")


def made_packed_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> tuple:
    """The launches of dq's kernel and of dk's and dv's, where ones for such tensors were made before; else nothing.

    dout, out  (B, N, H * D)      gradients are as qkv (B, N, 3 * H * D) is
    """
    heads = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (dout, out)]
    rows = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    tensors = (heads[0], *rows, heads[1], lse, *rows, lse)
    found = made(("attention_bwd", scale, facts(tensors)))
    return found if [replay.names for replay in found] == [DQ_POINTERS, DKV_POINTERS] else ()


def aot_cases(arch: int = 90) -> list[AotCase]:
    """What a device of this architecture compiles for packed inputs, ViT-B/16 at 224 pixels (D = 64, N = 197) first."""
    cases: dict[Any, AotCase] = {}
    sizes = [(64, length) for length in (197, 50, 65, 150, 256, 577)]
    sizes += [(72, 729), (80, 257), (88, 257), (128, 1025)]
    sizes += [(dim, 197) for dim in (32, 40, 48, 56, 96, 104, 112, 120)]
    device = Limits.of_arch(arch)
    for (dim, length), dtype in product(sizes, (torch.bfloat16, torch.float16, torch.float32)):
        qkv = torch.empty(2, length, 3, 12, dim, dtype=dtype, device="meta")
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.empty(2, length, 12, dim, dtype=dtype, device="meta").transpose(1, 2)
        lse = new_statistics(q, q.shape[:3])
        launches = [_fwd_launch(q, k, v, out, lse, 0.125, device)]
        launches += _bwd_launches(out, q, k, v, out, lse, 0.125, q, k, v, device)
        for launch in launches:
            name = f"{launch.kernel.fn.__name__.strip('_')}_{str(dtype).removeprefix('torch.')}_d{dim}_n{length}"
            case = replace(launch.aot_case(name), waste=_waste(launch.kernel, launch.constexprs, length))
            cases.setdefault((launch.kernel.fn.__name__, dtype, repr(launch.tiles)), case)
    return list(cases.values())


def _waste(kernel: Any, tiles: dict[str, Any], tokens: int) -> float:
    """Share of a head's products that falls on padding, of queries, keys and columns."""
    owned, met = ("BLOCK_N", "BLOCK_M") if kernel is _attention_bwd_dkv_kernel else ("BLOCK_M", "BLOCK_N")
    every_row, every_column = (
        sum(tiles["KEYS"]) if "KEYS" in tiles and block == met else triton.cdiv(tokens, tiles[block]) * tiles[block]
        for block in (met, owned)
    )
    return 1 - tokens * tokens * tiles["D"] / (every_row * every_column * sum(tiles["COLS"]))


def _check(q: Tensor, scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}, expected a number > 0")
    if q.shape[-1] % 8 or not 32 <= q.shape[-1] <= 128:
        raise ValueError(f"attention: q has head dim {q.shape[-1]}, expected a multiple of 8 from 32 to 128")


def _rows(tensor: Tensor, longest: int | None = None) -> Tensor:
    """What the kernels can read in place: rows of D values side by side, those of a head within 2^31 values.

    longest   rows of a head that are read together, all of them by default
    """
    reach = (tensor.shape[2] if longest is None else longest) * tensor.stride(2)
    return tensor if tensor.stride(-1) == 1 and reach < 2**31 else tensor.contiguous()


def _launch(
    kernel: Any,
    settings: AttentionSettings,
    programs: int,
    rows: tuple[Tensor, ...],
    statistics: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    **form: bool,
) -> Launch:
    """``rows`` are (B, H, N, D) tensors; ``form`` holds a kernel's switches."""
    unit, strides = unit_strides(rows)
    constexprs = {"D": rows[0].shape[-1], "UNIT": unit, **form}
    return Launch.of(kernel, (programs,), (*rows, *statistics, *strides, *scalars), constexprs, settings)


def _fwd_launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, device: Limits) -> Launch:
    batch, heads, nq, dim = q.shape
    settings = attention_settings("fwd", q.dtype, dim, k.shape[2], device.arch)
    tiles = triton.cdiv(nq, settings.block_m)
    scalars: tuple[float, ...] = (scale, heads, nq, k.shape[2])
    if not settings.short:
        return _launch(_attention_fwd_kernel, settings, tiles * batch * heads, (q, k, v, out), (lse,), scalars)
    # one program takes several query blocks of its head, as many as leave the device full
    blocks = max(1, min(tiles, tiles * batch * heads // (4 * device.processors)))
    programs = triton.cdiv(tiles, blocks) * batch * heads
    scalars = (*scalars, blocks)
    form = {"RUNNING": settings.running}
    return _launch(_attention_short_fwd_kernel, settings, programs, (q, k, v, out), (lse,), scalars, **form)


def _bwd_launches(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, dq: Tensor, dk: Tensor,
    dv: Tensor, device: Limits, delta: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    batch, heads, nq, dim = q.shape
    nk = k.shape[2]
    scalars = (scale, heads, nq, nk)
    settings = attention_settings("bwd", q.dtype, dim, nk, device.arch)
    if settings.short:
        rows = (q, k, v, out, dout, dq, dk, dv)
        return [_launch(_attention_short_bwd_kernel, settings, batch * heads, rows, (lse,), scalars)]
    # dQ goes first: it meets every row of dout and out, and leaves delta = sum(dout * out) for dK and dV
    delta = lse.new_empty(q.shape[:3]) if delta is None else delta
    dq_settings = attention_settings("bwd_dq", q.dtype, dim, nk, device.arch)
    dq_programs = triton.cdiv(nq, dq_settings.block_m) * batch * heads
    dkv_programs = triton.cdiv(nk, settings.block_n) * batch * heads
    return [
        _launch(_attention_bwd_dq_kernel, dq_settings, dq_programs, (q, k, v, out, dout, dq), (lse, delta), scalars),
        _launch(_attention_bwd_dkv_kernel, settings, dkv_programs, (q, k, v, dout, dk, dv), (lse, delta), scalars),
    ]


@triton.jit
def _split_pid(tiles, H):
    """(batch, head, tile) of this program; batch and head in int64, as their offsets can pass 2^31."""
    pid = tl.program_id(0)
    pid_bh = pid // tiles
    return (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64), pid % tiles


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, UNIT: tl.constexpr):
    return ptr + (b * stride_b + h * stride_h) * UNIT


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, block by block, with a running row maximum."""
    b, h, pid_m = _split_pid(tl.cdiv(Nq, BLOCK_M), H)
    begin = pid_m * BLOCK_M
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    offs_m = begin + tl.arange(0, BLOCK_M)
    q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zeros(BLOCK_M, COLS)
    IEEE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        # the last key block is ragged (N = 197): padded keys must not enter the row maximum
        scores = tl.where(offs_n[None, :] < Nk, inner(q, k), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = weights(scores, new_max[:, None], scale, IEEE)
        shrink = tl.exp2((row_max - new_max) * (scale * LOG2_E))
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = outer(p, v, scaled(acc, shrink[:, None]))
        row_max = new_max
    store(out_ptr, offs_m, stride_on, Nq, scaled(acc, 1.0 / row_sum[:, None]), D, UNIT, COLS)
    statistics, rows = (b * H + h) * Nq + offs_m, statistic_rows(Nq, Nq, BLOCK_M)
    save_statistics(lse_ptr, statistics, rows, offs_m < Nq, row_max, row_sum, scale, IEEE)


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    scale, H, Nq, Nk, blocks,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
    RUNNING: tl.constexpr,
):  # fmt: skip
    """Several query blocks of one head against all its keys, held in tiles of KEYS rows (197 keys: 128 + 64 + 16)."""
    b, h, pid_m = _split_pid(tl.cdiv(tl.cdiv(Nq, BLOCK_M), blocks), H)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    k = load_tiles(k_ptr, stride_kn, Nk, D, UNIT, COLS, KEYS)
    v = load_tiles(v_ptr, stride_vn, Nk, D, UNIT, COLS, KEYS)
    begin = pid_m * blocks * BLOCK_M
    end = tl.minimum(begin + blocks * BLOCK_M, Nq)
    if RUNNING:
        q = load(q_ptr, begin + tl.arange(0, BLOCK_M), stride_qn, Nq, D, UNIT, COLS)
    for start_m in range(begin, end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        if RUNNING:  # the registers it leaves hold the next queries, on their way meanwhile
            q_next = load(q_ptr, offs_m + BLOCK_M, stride_qn, end, D, UNIT, COLS)
            acc, row_max, row_sum = attend_by_tile(q, k, v, Nk, scale, BLOCK_M, COLS, KEYS)
        else:
            q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
            acc, row_max, row_sum = attend_at_once(q, k, v, Nk, scale, BLOCK_M, COLS, KEYS)
        store(out_ptr, offs_m, stride_on, Nq, scaled(acc, 1.0 / row_sum[:, None]), D, UNIT, COLS)
        save_statistics(lse_ptr, (b * H + h) * Nq + offs_m, 0, offs_m < Nq, row_max, row_sum, scale, False)
        if RUNNING:
            q = q_next


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries: delta = sum(dout * out), then dQ = scale * dS K with dS = P * (dout V^T - delta)."""
    b, h, pid_m = _split_pid(tl.cdiv(Nq, BLOCK_M), H)
    begin = pid_m * BLOCK_M
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT)
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, UNIT)
    offs_m = begin + tl.arange(0, BLOCK_M)
    statistics = (b * H + h) * Nq + offs_m
    out = load(out_ptr, offs_m, stride_on, Nq, D, UNIT, COLS)
    dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
    delta = row_sum(out, dout)
    tl.store(delta_ptr + statistics, delta, mask=offs_m < Nq)
    q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
    IEEE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    top, log = load_statistics(lse_ptr, statistics, statistic_rows(Nq, Nq, BLOCK_M), offs_m < Nq, IEEE)
    dq = zeros(BLOCK_M, COLS)
    for start_n in range(0, Nk, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        # a padded key scores 0, perhaps far above a very negative lse: its p would overflow
        scores = tl.where(offs_n[None, :] < Nk, inner(q, k), float("-inf"))
        p = probabilities(scores, top[:, None], log[:, None], scale, IEEE)
        dq = outer(p * (inner(dout, v) - delta[:, None]), k, dq)
    store(dq_ptr, offs_m, stride_dqn, Nq, scaled(dq, scale), D, UNIT, COLS)


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: dV = P^T dout, dK = scale * dS^T Q. Scores are (keys, queries): P^T needs no turning."""
    b, h, pid_n = _split_pid(tl.cdiv(Nk, BLOCK_N), H)
    begin = pid_n * BLOCK_N
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT)
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT)
    dk_ptr = _head(dk_ptr, b, h, stride_dkb, stride_dkh, UNIT)
    dv_ptr = _head(dv_ptr, b, h, stride_dvb, stride_dvh, UNIT)
    offs_n = begin + tl.arange(0, BLOCK_N)
    k = load(k_ptr, offs_n, stride_kn, Nk, D, UNIT, COLS)
    v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
    dk = zeros(BLOCK_N, COLS)
    dv = zeros(BLOCK_N, COLS)
    IEEE: tl.constexpr = k[0].dtype == tl.float32
    rows = statistic_rows(Nq, Nk, BLOCK_N)
    for start_m in range(0, Nq, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
        dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
        statistics = (b * H + h) * Nq + offs_m
        top, log = load_statistics(lse_ptr, statistics, rows, offs_m < Nq, IEEE)
        delta = tl.load(delta_ptr + statistics, mask=offs_m < Nq, other=0.0)
        p = probabilities(inner(k, q), top[None, :], log[None, :], scale, IEEE)
        dv = outer(p, dout, dv)
        dk = outer(p * (inner(v, dout) - delta[None, :]), q, dk)
    store(dk_ptr, offs_n, stride_dkn, Nk, scaled(dk, scale), D, UNIT, COLS)
    store(dv_ptr, offs_n, stride_dvn, Nk, dv, D, UNIT, COLS)


@triton.jit(do_not_specialize=_RUNTIME)
def _attention_short_bwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    scale, H, Nq, Nk,
    D: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One head: its queries, block by block, against all keys, in tiles of KEYS rows. Each score is computed once."""
    b, h, _ = _split_pid(1, H)
    k = load_tiles(_head(k_ptr, b, h, stride_kb, stride_kh, UNIT), stride_kn, Nk, D, UNIT, COLS, KEYS)
    v = load_tiles(_head(v_ptr, b, h, stride_vb, stride_vh, UNIT), stride_vn, Nk, D, UNIT, COLS, KEYS)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT)
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT)
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT)
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, UNIT)
    dk = ()
    dv = ()
    for j in tl.static_range(len(KEYS)):
        dk = dk + (zeros(KEYS[j], COLS),)
        dv = dv + (zeros(KEYS[j], COLS),)
    for start_m in range(0, Nq, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load(q_ptr, offs_m, stride_qn, Nq, D, UNIT, COLS)
        out = load(out_ptr, offs_m, stride_on, Nq, D, UNIT, COLS)
        dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
        delta = row_sum(out, dout)
        top, log = load_statistics(lse_ptr, (b * H + h) * Nq + offs_m, 0, offs_m < Nq, False)
        new_dk = ()
        new_dv = ()
        dq_t = zeros_t(COLS, BLOCK_M)
        for j in tl.static_range(len(KEYS)):
            scores = inner(k[j], q)
            if j == len(KEYS) - 1:  # a padded key scores 0, perhaps far above a very negative lse: its p would overflow
                scores = tl.where((before(KEYS, j) + tl.arange(0, KEYS[j]))[:, None] < Nk, scores, float("-inf"))
            p = probabilities(scores, top[None, :], log[None, :], scale, False)
            new_dv = new_dv + (outer(p, dout, dv[j]),)
            ds = cast(p * (inner(v[j], dout) - delta[None, :]), q[0].dtype)
            new_dk = new_dk + (outer(ds, q, dk[j]),)
            dq_t = outer_t(k[j], ds, dq_t)
        dk = new_dk
        dv = new_dv
        dq = ()
        for i in tl.static_range(len(COLS)):
            dq = dq + (dq_t[i].T * scale,)
        store(dq_ptr, offs_m, stride_dqn, Nq, dq, D, UNIT, COLS)
    dk_ptr = _head(dk_ptr, b, h, stride_dkb, stride_dkh, UNIT)
    dv_ptr = _head(dv_ptr, b, h, stride_dvb, stride_dvh, UNIT)
    for j in tl.static_range(len(KEYS)):
        offs_n = before(KEYS, j) + tl.arange(0, KEYS[j])
        store(dk_ptr, offs_n, stride_dkn, Nk, scaled(dk[j], scale), D, UNIT, COLS)
        store(dv_ptr, offs_n, stride_dvn, Nk, dv[j], D, UNIT, COLS)
