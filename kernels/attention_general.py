"""Multi-head attention with options, forward and backward: masks, causal order, dropout, batches of ragged lengths,
normalised and rotated q and k.

One streaming form for every length and dtype; each option is a switch at compile time, so what is not asked for costs
nothing, and plain calls keep the kernels of ``attention``. A mask is read by its strides: a broadcast axis has stride
0 and takes no memory. Dropout keeps a weight by a counter, not by a stored mask: Philox of the seed and of the
weight's (batch, head, query, key), so the backward draws the same one again. q and k are normalised and rotated each
time they are loaded (see _qk): only the raw ones and their gradients ever lie in memory.

Meaning: fastvit.reference.attention. Source of the generator: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et
al., 2011).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import AotCase, AttentionSettings, Limits, attention_settings, pair_cols
from ._launch import Launch, limits, run_on, unit_strides
from ._options import Options
from ._qk import Preparation, load_prepared, raw_gradient, store_heads, widths
from ._softmax import LOG2_E
from ._tiles import inner, load, outer, row_sum, scaled, store, zeros
from .attention import _check, _head, _rows

# one binary serves every batch, length, stride and probability
_RUNTIME = ["scale", "threshold", "keep_scale", "H", "Nq", "Nk", "tiles", "stride_sb", "stride_sh"]
_RUNTIME += [f"stride_{tensor}{axis}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for axis in "bhn"]
_RUNTIME += [f"stride_m{axis}" for axis in "bhmn"]
_RUNTIME += ["stride_rb", "stride_rh", "q_eps", "k_eps", "num_prefix"]


def attention_general_fwd(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``out`` and each query's statistics: its largest score, and log2 of its sum of exp(score - largest).

    q          (B, H, Nq, D)  float16 | bfloat16 | float32; D a multiple of 8 from 32 to 128
    k, v       (B, H, Nk, D)  dtype of q
    out        (B, H, Nq, D)  dtype of q, a view of a contiguous (B, Nq, H, D) tensor; zeros where all keys are masked
    top, log   (B, H, Nq)     float32; two numbers, as their sum would lose log beside a mask of -1e30
    """
    _check(q, options.scale)
    q, k, v = (_rows(t, options.longest) for t in (q, k, v))
    batch, heads, nq, dim = q.shape
    out = q.new_empty(batch, nq, heads, dim).transpose(1, 2)
    top, log = (q.new_empty(batch, heads, nq, dtype=torch.float32) for _ in range(2))
    if q.numel():
        options = options.readable()
        tensors = {"q": q, "k": k, "v": v, "out": out, "top": top, "log": log, **options.tensors()}
        arguments = (q, k, v, out, top, log, options, limits(q.device))
        run_on(tensors, ("attention_general_fwd", options.numbers()), lambda: [_fwd_launch(*arguments)])
    return out, top, log


def attention_general_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    log: Tensor,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of ``attention_general_fwd`` into dq, dk and dv, without atomics.

    Returns those of weight and bias (2, D) float32 of q's norm and of k's; zeros without a norm.
    """
    _check(q, options.scale)
    dout, q, k, v, out = (_rows(t, options.longest) for t in (dout, q, k, v, out))
    if q.numel() == 0:
        return q.new_zeros(2, q.shape[3], dtype=torch.float32), q.new_zeros(2, q.shape[3], dtype=torch.float32)
    given = (dout, q, k, v, out, top, log, options.readable(), dq, dk, dv)
    launches, sums = _bwd_launches(*given, limits(q.device))
    for launch in launches:
        launch.run()
    return sums[0].sum(0), sums[1].sum(0)


def aot_cases(arch: int = 90) -> list[AotCase]:
    """The options one by one at D = 64, all together at every way to cut a head dim, and prepared heads at each D."""
    cases: dict[Any, AotCase] = {}
    for (dim, label, options), dtype in _aot_calls(arch):
        batch = 1 if label == "varlen" else 2
        q = torch.empty(batch, 197, 3, 12, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)[0]
        out = torch.empty(batch, 197, 12, dim, dtype=dtype, device="meta").transpose(1, 2)
        top = torch.empty(batch, 12, 197, device="meta")
        device = Limits.of_arch(arch)
        options = options.readable()
        launches = [_fwd_launch(q, q, q, out, top, top, options, device)]
        launches += _bwd_launches(out, q, q, q, out, top, top, options, q, q, q, device)[0]
        for launch in launches:
            name = f"{launch.kernel.fn.__name__.strip('_')}_{str(dtype).removeprefix('torch.')}_d{dim}_{label}"
            cases[name] = launch.aot_case(name)
    return list(cases.values())


def _aot_calls(arch: int) -> list[tuple[tuple[int, str, Options], torch.dtype]]:
    """((head dim, label, options), dtype). What no setting depends on is compiled for sm_90 alone."""
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    mask = torch.empty(2, 1, 197, 197, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    together = Options(0.125, mask.bfloat16(), True, 0.1, seed)
    unprepared = [
        (64, "keys", Options(0.125, attn_mask=mask[:, :, :1].bool())),
        (64, "bool", Options(0.125, attn_mask=mask.bool())),
        (64, "float", Options(0.125, attn_mask=mask)),
        (64, "dropout", Options(0.125, dropout_p=0.1, dropout_seed=seed)),
        (64, "varlen", Options(0.125, cu_seqlens=cu_seqlens, max_seqlen=197)),
        *((dim, "all", together) for dim in (32, 64, 80, 96, 104, 128)),
    ]

    def prepared(dim: int, label: str, options: Options = together) -> tuple[int, str, Options]:
        return dim, label, replace(options, preparation=_aot_preparation(dim, label))

    calls = list(product(unprepared, (torch.bfloat16, torch.float16, torch.float32)))
    calls += product([prepared(dim, "half") for dim in (32, 64, 72, 80, 96, 128)], (torch.bfloat16, torch.float32))
    if arch == 90:
        alone = prepared(64, "half", Options(0.125))
        others = [prepared(64, "interleaved"), prepared(72, "rms"), (64, "half_alone", alone[2])]
        calls += [*product(others, (torch.bfloat16,)), (prepared(64, "half"), torch.float16)]
    return calls


def _aot_preparation(dim: int, label: str) -> Preparation:
    """A norm, and a rotation where ``label`` names its layout."""
    weight = torch.empty(dim, device="meta")
    table = torch.empty(196, 2 * dim, device="meta") if label in ("half", "interleaved") else None
    biases = {} if label == "rms" else {"q_bias": weight, "k_bias": weight}
    norm = "rms" if label == "rms" else "layer"
    return Preparation(weight, k_weight=weight, norm=norm, rope=table, num_prefix=1, half=label == "half", **biases)


def _programs(settings: AttentionSettings, options: Options, shape: tuple[int, ...], by_keys: bool) -> tuple[int, int]:
    """(samples, blocks of each): one program takes a block of a head's queries or, ``by_keys``, of its keys."""
    batch, longest = shape[0], shape[3] if by_keys else shape[2]
    if options.cu_seqlens is not None:
        batch, longest = options.cu_seqlens.numel() - 1, options.max_seqlen
    return batch, triton.cdiv(longest, settings.block_n if by_keys else settings.block_m)


def _sums(settings: AttentionSettings, options: Options, shape: tuple[int, ...], like: Tensor, by_keys: bool) -> Tensor:
    """What each program adds to the gradients of a norm's weight and bias; the second stage adds them up in order."""
    batch, tiles = _programs(settings, options, shape, by_keys)
    programs = batch * shape[1] * tiles if options.preparation.norm else 1
    return like.new_zeros(programs, 2, like.shape[3], dtype=torch.float32)


def _launch(
    kernel: Any,
    settings: AttentionSettings,
    rows: tuple[Tensor, ...],
    statistics: tuple[Tensor, ...],
    options: Options,
    shape: tuple[int, int, int, int],
    by_keys: bool = False,
) -> Launch:
    """``shape`` is (B, H, Nq, Nk)."""
    _, heads, nq, nk = shape
    batch, tiles = _programs(settings, options, shape, by_keys)
    stat_strides = list(statistics[0].stride()[:2])
    if options.cu_seqlens is not None:  # the samples lie one after another: none has a stride of its own
        stat_strides[0] = 0
        rows = tuple(t.expand(batch, -1, -1, -1) for t in rows)
    unit, strides = unit_strides(rows)
    mask_strides = _mask_strides(options.attn_mask, shape)
    preparation, dim = options.preparation, rows[0].shape[-1]
    arguments = (
        *rows, *statistics, *options.tensors().values(), *preparation.numbers(batch, heads),
        *strides, *stat_strides, *mask_strides,
        options.scale, round(options.dropout_p * 2**24), 1.0 / (1.0 - options.dropout_p), heads, nq, nk, tiles,
    )  # fmt: skip
    constexprs = {"D": dim, "UNIT": unit, "CAUSAL": options.is_causal}
    constexprs["ONE_ROW"] = mask_strides[2] == 0  # one row of the mask, e.g. the padding of keys, serves every query
    constexprs |= {"NORM": preparation.norm, "PAIRS": preparation.pairs}
    constexprs["QK_COLS"] = pair_cols(rows[0].dtype, dim, settings.cols) if preparation.pairs else settings.cols
    return Launch.of(kernel, (tiles * batch * heads,), arguments, constexprs, settings)


def _mask_strides(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Along B, H, Nq and Nk: 0 where it is broadcast."""
    return (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()


def _settings(kernel: str, q: Tensor, keys: int, options: Options, device: Limits) -> AttentionSettings:
    prepared = bool(options.preparation.norm or options.preparation.pairs)
    return attention_settings(kernel, q.dtype, q.shape[3], keys, device.arch, general=True, prepared=prepared)


def _fwd_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, log: Tensor, options: Options, device: Limits
) -> Launch:
    shape = (*q.shape[:3], k.shape[2])
    settings = _settings("fwd", q, shape[3], options, device)
    return _launch(_general_fwd_kernel, settings, (q, k, v, out), (top, log), options, shape)


def _bwd_launches(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, log: Tensor, options: Options, dq: Tensor,
    dk: Tensor, dv: Tensor, device: Limits,
) -> tuple[list[Launch], list[Tensor]]:  # fmt: skip
    """The launches, and what they leave of the gradients of the norms: (programs, 2, D) float32 of q's and of k's."""
    shape = (*q.shape[:3], k.shape[2])
    dq_settings, dkv_settings = (_settings(kernel, q, shape[3], options, device) for kernel in ("bwd_dq", "bwd"))
    delta = torch.empty_like(top)  # dQ leaves sum(dout * out) for dK and dV
    dq_sums = _sums(dq_settings, options, shape, q, False)
    dk_sums = _sums(dkv_settings, options, shape, q, True)
    statistics = (top, log, delta)
    return [
        _launch(_general_bwd_dq_kernel, dq_settings, (q, k, v, out, dout, dq), (*statistics, dq_sums), options, shape),
        _launch(_general_bwd_dkv_kernel, dkv_settings, (q, k, v, dout, dk, dv), (*statistics, dk_sums), options, shape,
                True),
    ], [dq_sums, dk_sums]  # fmt: skip


@triton.jit
def _place(tiles, H):
    """(batch, head, tile) of this program; batch and head in int64, as their offsets can pass 2^31."""
    pid_bh = tl.program_id(0) // tiles
    return (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64), tl.program_id(0) % tiles


@triton.jit
def _sample(cu_ptr, b, Nq, Nk):
    """(first row, queries, keys) of sample ``b``."""
    if cu_ptr is None:
        return b * 0, Nq, Nk
    else:
        begin = tl.load(cu_ptr + b).to(tl.int64)
        rows = (tl.load(cu_ptr + b + 1).to(tl.int64) - begin).to(tl.int32)
        return begin, rows, rows


@triton.jit
def _scores(
    products, scale, mask_ptr, stride_mm, stride_mn, offs_m, offs_n, Nq, Nk, CAUSAL: tl.constexpr, ONE_ROW: tl.constexpr
):
    """scale * products + mask; -inf for pairs that take no part. offs_m, offs_n broadcast to products' shape."""
    takes_part = offs_n < Nk
    if CAUSAL:
        takes_part = takes_part & (offs_n <= offs_m)
    scores = products * scale
    if mask_ptr is not None:
        ptrs, inside = mask_ptr + offs_n.to(tl.int64) * stride_mn, offs_n < Nk
        if not ONE_ROW:
            ptrs, inside = ptrs + offs_m.to(tl.int64) * stride_mm, inside & (offs_m < Nq)
        mask = tl.load(ptrs, mask=inside, other=0)
        if mask_ptr.dtype.element_ty == tl.uint8:
            takes_part = takes_part & (mask != 0)
        else:
            scores += mask.to(tl.float32)
    return tl.where(takes_part, scores, float("-inf"))


@triton.jit
def _kept(seed_ptr, threshold, bh, offs_m, offs_n):
    """Which weights dropout keeps, at random with a chance of 1 - threshold / 2^24 each."""
    none = (offs_m + offs_n) * 0
    random, _, _, _ = tl.philox(tl.load(seed_ptr), offs_n + none, offs_m + none, bh.to(tl.int32) + none, none)
    return (random >> 8).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=_RUNTIME)
def _general_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, top_ptr, log_ptr, mask_ptr, seed_ptr, cu_ptr,
    qw_ptr, qb_ptr, kw_ptr, kb_ptr, rope_ptr, stride_rb, stride_rh, q_eps, k_eps, num_prefix,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    stride_sb, stride_sh, stride_mb, stride_mh, stride_mm, stride_mn,
    scale, threshold, keep_scale, H, Nq, Nk, tiles,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, ONE_ROW: tl.constexpr,
    NORM: tl.constexpr, PAIRS: tl.constexpr, QK_COLS: tl.constexpr,
    COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, block by block, with a running row maximum."""
    b, h, pid_m = _place(tiles, H)
    begin, Nq, Nk = _sample(cu_ptr, b, Nq, Nk)
    if cu_ptr is not None:
        if pid_m * BLOCK_M >= Nq:
            return
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT) + begin * stride_qn * UNIT
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT) + begin * stride_kn * UNIT
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT) + begin * stride_vn * UNIT
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT) + begin * stride_on * UNIT
    statistics = b * stride_sb + h * stride_sh + begin + offs_m
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    if rope_ptr is not None:
        rope_ptr += (b * stride_rb + h * stride_rh + begin) * (2 * D)
    q = load_prepared(
        q_ptr, offs_m, stride_qn, Nq, qw_ptr, qb_ptr, q_eps, rope_ptr, num_prefix, D, UNIT, QK_COLS, PAIRS, NORM
    )
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zeros(BLOCK_M, COLS)
    end = Nk
    if CAUSAL:  # later keys take no part
        end = tl.minimum(Nk, (pid_m + 1) * BLOCK_M)
    for start_n in range(0, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_prepared(
            k_ptr, offs_n, stride_kn, Nk, kw_ptr, kb_ptr, k_eps, rope_ptr, num_prefix, D, UNIT, QK_COLS, PAIRS, NORM
        )
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        m, n = offs_m[:, None], offs_n[None, :]
        scores = _scores(inner(q, k), scale, mask_ptr, stride_mm, stride_mn, m, n, Nq, Nk, CAUSAL, ONE_ROW)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # a row without a key so far: -inf - -inf would be NaN
        top = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2((scores - top[:, None]) * LOG2_E)
        shrink = tl.exp2((row_max - top) * LOG2_E)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(_kept(seed_ptr, threshold, b * H + h, m, n), p, 0.0)
        acc = outer(p, v, scaled(acc, shrink[:, None]))
        row_max = new_max
    masked_out = row_sum == 0.0
    if seed_ptr is not None:
        acc = scaled(acc, keep_scale)
    out = scaled(acc, tl.where(masked_out, 0.0, 1.0 / row_sum)[:, None])
    store(out_ptr, offs_m, stride_on, Nq, out, D, UNIT, COLS)
    tl.store(top_ptr + statistics, tl.where(masked_out, 0.0, row_max), mask=offs_m < Nq)
    tl.store(log_ptr + statistics, tl.where(masked_out, 0.0, tl.log2(row_sum)), mask=offs_m < Nq)


@triton.jit(do_not_specialize=_RUNTIME)
def _general_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, top_ptr, log_ptr, delta_ptr, sums_ptr, mask_ptr, seed_ptr, cu_ptr,
    qw_ptr, qb_ptr, kw_ptr, kb_ptr, rope_ptr, stride_rb, stride_rh, q_eps, k_eps, num_prefix,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    stride_sb, stride_sh, stride_mb, stride_mh, stride_mm, stride_mn,
    scale, threshold, keep_scale, H, Nq, Nk, tiles,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, ONE_ROW: tl.constexpr,
    NORM: tl.constexpr, PAIRS: tl.constexpr, QK_COLS: tl.constexpr,
    COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries: delta = sum(dout * out), then dQ = scale * dS K with dS = P * (dP - delta)."""
    b, h, pid_m = _place(tiles, H)
    begin, Nq, Nk = _sample(cu_ptr, b, Nq, Nk)
    if cu_ptr is not None:
        if pid_m * BLOCK_M >= Nq:
            return
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT) + begin * stride_qn * UNIT
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT) + begin * stride_kn * UNIT
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT) + begin * stride_vn * UNIT
    out_ptr = _head(out_ptr, b, h, stride_ob, stride_oh, UNIT) + begin * stride_on * UNIT
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT) + begin * stride_don * UNIT
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, UNIT) + begin * stride_dqn * UNIT
    statistics = b * stride_sb + h * stride_sh + begin + offs_m
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    if rope_ptr is not None:
        rope_ptr += (b * stride_rb + h * stride_rh + begin) * (2 * D)
    dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
    delta = row_sum(load(out_ptr, offs_m, stride_on, Nq, D, UNIT, COLS), dout)
    tl.store(delta_ptr + statistics, delta, mask=offs_m < Nq)
    q = load_prepared(
        q_ptr, offs_m, stride_qn, Nq, qw_ptr, qb_ptr, q_eps, rope_ptr, num_prefix, D, UNIT, QK_COLS, PAIRS, NORM
    )
    top = tl.load(top_ptr + statistics, mask=offs_m < Nq, other=0.0)
    log = tl.load(log_ptr + statistics, mask=offs_m < Nq, other=0.0)
    dq = zeros(BLOCK_M, widths(QK_COLS, PAIRS))
    end = Nk
    if CAUSAL:
        end = tl.minimum(Nk, (pid_m + 1) * BLOCK_M)
    for start_n in range(0, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_prepared(
            k_ptr, offs_n, stride_kn, Nk, kw_ptr, kb_ptr, k_eps, rope_ptr, num_prefix, D, UNIT, QK_COLS, PAIRS, NORM
        )
        v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
        m, n = offs_m[:, None], offs_n[None, :]
        scores = _scores(inner(q, k), scale, mask_ptr, stride_mm, stride_mn, m, n, Nq, Nk, CAUSAL, ONE_ROW)
        p = tl.exp2((scores - top[:, None]) * LOG2_E - log[:, None])
        dp = inner(dout, v)
        if seed_ptr is not None:
            kept = _kept(seed_ptr, threshold, b * H + h, m, n)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dq = outer(p * (dp - delta[:, None]), k, dq)
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * D)
    dq = raw_gradient(
        scaled(dq, scale), q_ptr, offs_m, stride_qn, Nq, qw_ptr, q_eps, rope_ptr, num_prefix, sums_ptr,
        D, UNIT, QK_COLS, PAIRS, NORM,
    )  # fmt: skip
    store_heads(dq_ptr, offs_m, stride_dqn, Nq, dq, D, UNIT, QK_COLS, PAIRS)


@triton.jit(do_not_specialize=_RUNTIME)
def _general_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, top_ptr, log_ptr, delta_ptr, sums_ptr, mask_ptr, seed_ptr, cu_ptr,
    qw_ptr, qb_ptr, kw_ptr, kb_ptr, rope_ptr, stride_rb, stride_rh, q_eps, k_eps, num_prefix,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_sb, stride_sh, stride_mb, stride_mh, stride_mm, stride_mn,
    scale, threshold, keep_scale, H, Nq, Nk, tiles,
    D: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, ONE_ROW: tl.constexpr,
    NORM: tl.constexpr, PAIRS: tl.constexpr, QK_COLS: tl.constexpr,
    COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: dV = P^T dout, dK = scale * dS^T Q. Scores are (keys, queries): P^T needs no turning."""
    b, h, pid_n = _place(tiles, H)
    begin, Nq, Nk = _sample(cu_ptr, b, Nq, Nk)
    if cu_ptr is not None:
        if pid_n * BLOCK_N >= Nk:
            return
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, UNIT) + begin * stride_qn * UNIT
    k_ptr = _head(k_ptr, b, h, stride_kb, stride_kh, UNIT) + begin * stride_kn * UNIT
    v_ptr = _head(v_ptr, b, h, stride_vb, stride_vh, UNIT) + begin * stride_vn * UNIT
    dout_ptr = _head(dout_ptr, b, h, stride_dob, stride_doh, UNIT) + begin * stride_don * UNIT
    dk_ptr = _head(dk_ptr, b, h, stride_dkb, stride_dkh, UNIT) + begin * stride_dkn * UNIT
    dv_ptr = _head(dv_ptr, b, h, stride_dvb, stride_dvh, UNIT) + begin * stride_dvn * UNIT
    statistics = b * stride_sb + h * stride_sh + begin
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    if rope_ptr is not None:
        rope_ptr += (b * stride_rb + h * stride_rh + begin) * (2 * D)
    k = load_prepared(
        k_ptr, offs_n, stride_kn, Nk, kw_ptr, kb_ptr, k_eps, rope_ptr, num_prefix, D, UNIT, QK_COLS, PAIRS, NORM
    )
    v = load(v_ptr, offs_n, stride_vn, Nk, D, UNIT, COLS)
    dk = zeros(BLOCK_N, widths(QK_COLS, PAIRS))
    dv = zeros(BLOCK_N, COLS)
    first = 0
    if CAUSAL:  # earlier queries take no part
        first = pid_n * BLOCK_N // BLOCK_M * BLOCK_M
    for start_m in range(first, Nq, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_prepared(
            q_ptr, offs_m, stride_qn, Nq, qw_ptr, qb_ptr, q_eps, rope_ptr, num_prefix, D, UNIT, QK_COLS, PAIRS, NORM
        )
        dout = load(dout_ptr, offs_m, stride_don, Nq, D, UNIT, COLS)
        # a padded query has top = inf, hence p = 0
        top = tl.load(top_ptr + statistics + offs_m, mask=offs_m < Nq, other=float("inf"))
        log = tl.load(log_ptr + statistics + offs_m, mask=offs_m < Nq, other=0.0)
        delta = tl.load(delta_ptr + statistics + offs_m, mask=offs_m < Nq, other=0.0)
        m, n = offs_m[None, :], offs_n[:, None]
        scores = _scores(inner(k, q), scale, mask_ptr, stride_mm, stride_mn, m, n, Nq, Nk, CAUSAL, ONE_ROW)
        p = tl.exp2((scores - top[None, :]) * LOG2_E - log[None, :])
        dp = inner(v, dout)
        if seed_ptr is not None:
            kept = _kept(seed_ptr, threshold, b * H + h, m, n)
            dp = tl.where(kept, dp * keep_scale, 0.0)
            dv = outer(tl.where(kept, p, 0.0), dout, dv)
        else:
            dv = outer(p, dout, dv)
        dk = outer(p * (dp - delta[None, :]), q, dk)
    if seed_ptr is not None:
        dv = scaled(dv, keep_scale)
    store(dv_ptr, offs_n, stride_dvn, Nk, dv, D, UNIT, COLS)
    # dK last: its way back through rotation and norm wants the registers of dV
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * D)
    dk = raw_gradient(
        scaled(dk, scale), k_ptr, offs_n, stride_kn, Nk, kw_ptr, k_eps, rope_ptr, num_prefix, sums_ptr,
        D, UNIT, QK_COLS, PAIRS, NORM,
    )  # fmt: skip
    store_heads(dk_ptr, offs_n, stride_dkn, Nk, dk, D, UNIT, QK_COLS, PAIRS)
