"""The Triton attention kernels against float64, forward and backward. Needs CUDA or TRITON_INTERPRET=1.

The interpreter takes about a second a call, so the grid is a cross and not a product: every length, head dim and dtype
appears, each pair of them does not. One or two heads are enough, as programs never share data.
"""

import importlib.util
import math
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvit import reference
from fastvit.testing import assert_as_accurate, sliced

pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels._configs import Limits, attention_settings, power_of_two_parts

from fastvit.kernels import attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET=1"
)

ROOT = Path(__file__).resolve().parent.parent
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def packed(batch, tokens, heads, dim, dtype, scale=1.0):
    """q, k and v as views of one (B, N, 3, H, D) tensor."""
    qkv = torch.randn(batch, tokens, 3, heads, dim) * scale
    return qkv.to(DEVICE, dtype).permute(2, 0, 3, 1, 4).unbind(0)


def separate(batch, heads, queries, keys, dim, dtype):
    sizes = (queries, keys, keys)
    return [torch.randn(batch, heads, size, dim).to(DEVICE, dtype) for size in sizes]


def nan_like(*tensors):
    """Fresh gradients: what is not written stays NaN."""
    return [torch.full_like(tensor, float("nan")) for tensor in tensors]


def run(q, k, v, dout, scale, grads=None):
    out, lse = kernels.attention_fwd(q, k, v, scale)
    dq, dk, dv = nan_like(q, k, v) if grads is None else grads
    kernels.attention_bwd(dout, q, k, v, out, lse, scale, dq, dk, dv)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}, lse


def log_sum_exp(saved, scale):
    """float32 saves two numbers a row."""
    return saved if saved.dim() == 3 else saved[0] * scale + saved[1] * math.log(2)


def torch_run(fn, q, k, v, dout, scale, dtype):
    # contiguous: on a GPU stock's kernels refuse rows that do not start at multiples of 16 bytes
    inputs = [tensor.detach().to(dtype).contiguous().requires_grad_() for tensor in (q, k, v)]
    out = fn(*inputs, scale=scale)
    grads = torch.autograd.grad(out, inputs, dout.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_parity(q, k, v, scale=None, dout=None, grads=None, factor=2.0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dout = torch.randn(q.shape).to(q) if dout is None else dout
    fused, lse = run(q, k, v, dout, scale, grads)
    eager = torch_run(F.scaled_dot_product_attention, q, k, v, dout, scale, q.dtype)
    exact = torch_run(reference.attention, q, k, v, dout, scale, torch.float64)
    for name, value in fused.items():
        assert_as_accurate(value, eager[name], exact[name], name, factor)
    scores = q.double() @ k.double().transpose(-2, -1) * scale
    error = (log_sum_exp(lse.double(), scale) - torch.logsumexp(scores, -1)).abs().max().item()
    assert error <= 2e-6 * (1 + scores.abs().max().item()), f"lse is off by {error}"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_packed_at_vit_size(dtype):
    batch, heads = (1, 1) if dtype == FP32 else (2, 2)
    assert_parity(*packed(batch, 197, heads, 64, dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_one_token(dtype):
    """One key takes all the weight, so q and k get no gradient, up to the rounding of dout v^T - delta."""
    q, k, v = packed(2, 1, 2, 64, dtype)
    dout = torch.randn_like(v)
    fused, lse = run(q, k, v, dout, 0.125)
    assert torch.equal(fused["out"], v)
    # of the same products, but perhaps not summed in the same order
    torch.testing.assert_close(fused["dv"], dout, rtol=2e-7, atol=0.0)
    assert max(fused["dq"].abs().max(), fused["dk"].abs().max()) < 1e-5
    torch.testing.assert_close(log_sum_exp(lse, 0.125), (q.double() * k.double()).sum(-1).mul(0.125).float())


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(50, FP32), (50, BF16), (65, FP32), (65, FP16), (150, BF16), (256, BF16), (257, FP32), (257, BF16),
     (577, BF16)],
    ids=str,
)  # fmt: skip
def test_lengths(tokens, dtype):
    assert_parity(*packed(1, tokens, 1, 64, dtype))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [*product([32, 40, 72, 80, 128], [FP32, BF16]), (56, FP16), (88, BF16), (96, FP16), (104, BF16)],
    ids=str,
)
def test_head_dims(dim, dtype):
    assert_parity(*packed(1, 65, 2 if dim < 64 else 1, dim, dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (70, 33), (33, 300)], ids=str)
def test_cross_lengths(queries, keys, dtype):
    assert_parity(*separate(1, 2, queries, keys, 64, dtype))


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "dtype"),
    [(80, 80, 64, BF16), (81, 81, 64, BF16), (144, 16, 48, FP16), (5, 261, 64, BF16), (261, 5, 64, FP16),
     (257, 257, 80, BF16), (272, 272, 64, BF16), (129, 145, 104, BF16), (66, 66, 32, BF16)],
    ids=str,
)  # fmt: skip
def test_the_last_rows_of_a_head(queries, keys, dim, dtype):
    """Up to 16 rows, of queries or keys, beyond whole blocks of 64 or 128."""
    assert_parity(*separate(1, 1, queries, keys, dim, dtype))


def test_wide_heads_over_several_key_blocks():
    assert_parity(*separate(1, 1, 130, 300, 80, BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_before_hopper(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "limits", lambda device: Limits.of_arch(80))
    assert_parity(*packed(1, 70, 1, 64, dtype))
    assert_parity(*packed(1, 70, 1, 96, dtype))


def test_blocks_of_queries_do_not_depend_on_the_number_of_programs(monkeypatch):
    q, k, v = packed(1, 197, 2, 64, BF16)
    outs = []
    for processors in (1, 2, 1000):
        monkeypatch.setattr(kernels, "limits", lambda device, n=processors: replace(Limits.of_arch(90), processors=n))
        outs.append(kernels.attention_fwd(q, k, v, 0.125))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0])
        assert torch.equal(lse, outs[0][1])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_sliced_views(dtype):
    assert_parity(*(sliced(tensor) for tensor in separate(2, 1, 50, 50, 64, dtype)))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_strides_that_no_vector_fits(dtype):
    q, k, v = (torch.randn(1, 2, 21, 43).to(DEVICE, dtype)[..., 3:] for _ in range(3))
    assert q.stride(2) % 8
    assert_parity(q, k, v)


def test_last_dim_not_contiguous():
    q, k, v = (torch.randn(1, 2, 32, 21).to(DEVICE).transpose(2, 3) for _ in range(3))
    dq, dk, dv = (torch.empty(1, 2, 21, 32, device=DEVICE) for _ in range(3))
    assert_parity(q, k, v, grads=(dq, dk, dv))


@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 64), (BF16, 72), (FP32, 40)], ids=str)
def test_gradients_are_written_in_place_and_nowhere_else(dtype, dim):
    tokens, heads = 37, 2
    q, k, v = packed(2, tokens, heads, dim, dtype)
    buffer = torch.full((3, tokens + 2, 3, heads, dim + 8), float("nan")).to(DEVICE, dtype)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    window = (slice(0, 2), slice(1, 1 + tokens), slice(None), slice(None), slice(0, dim))
    inside[window] = True
    assert_parity(q, k, v, grads=buffer[window].permute(2, 0, 3, 1, 4).unbind(0))
    assert torch.equal(torch.isnan(buffer), ~inside)


def test_output_and_gradient_layouts():
    q, k, v = packed(2, 9, 2, 32, FP32)
    out, lse = kernels.attention_fwd(q, k, v, 1.0)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    tokens_last = torch.randn(2, 2, 9, 32).to(DEVICE)
    assert_parity(q, k, v, dout=tokens_last.transpose(1, 2).contiguous().transpose(1, 2))
    assert_parity(q, k, v, dout=torch.ones(1, 1, 1, 1, device=DEVICE).expand(2, 2, 9, 32))


@pytest.mark.parametrize(("dtype", "tokens"), [(FP32, 50), (BF16, 50), (FP16, 50), (BF16, 260)], ids=str)
def test_large_magnitude(dtype, tokens):
    """Scores of many hundreds. In float32 their own rounding, hence the order of the dot's sum, decides the error."""
    assert_parity(*packed(1, tokens, 1, 64, dtype, scale=10.0), factor=16.0 if dtype == FP32 else 2.0)


@pytest.mark.parametrize(("dtype", "tokens"), [(FP32, 50), (BF16, 50), (BF16, 260)], ids=str)
def test_scores_far_below_zero(dtype, tokens):
    """A padded key scores 0; here every real key scores about -800, so a padded one would win everything.

    All keys being alike, dQ lives on sum(dS) = 0; float32 scores that round differently in the two passes break it by
    an ulp of 800, which stock PyTorch, keeping its weights, does not see.
    """
    q, k, v = packed(1, tokens, 1, 64, dtype)
    assert_parity(q * 0.1 + 10, k * 0.1 - 10, v, factor=100.0 if dtype == FP32 else 2.0)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scales(scale):
    assert_parity(*packed(1, 33, 1, 32, FP32), scale=scale)


@pytest.mark.parametrize(("dtype", "keys"), [(FP32, 40), (BF16, 40), (BF16, 300)], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_spread_as_in_the_formula(dtype, keys, poison):
    q, k, v = separate(1, 3, 40, keys, 40, dtype)
    q[0, 0, 5, 3] = k[0, 1, 7, 3] = v[0, 2, 9, 3] = poison
    dout = torch.ones_like(q)
    fused, _ = run(q, k, v, dout, 0.2)
    exact = torch_run(reference.attention, q, k, v, dout, 0.2, FP32)
    for name in fused if math.isnan(poison) else ("out",):
        assert torch.equal(torch.isnan(fused[name]), torch.isnan(exact[name])), name
        assert torch.equal(torch.isinf(fused[name]), torch.isinf(exact[name])), name


@pytest.mark.parametrize(("dtype", "dim", "tokens"), [(BF16, 64, 197), (BF16, 80, 65), (FP32, 64, 65)], ids=str)
def test_same_bits_every_run(dtype, dim, tokens):
    q, k, v = packed(1, tokens, 1, dim, dtype)
    dout = torch.randn_like(q)
    first, _ = run(q, k, v, dout, 0.125)
    second, _ = run(q, k, v, dout, 0.125)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_no_images():
    q, k, v = packed(0, 50, 2, 64, BF16)
    fused, lse = run(q, k, v, torch.empty_like(q), 0.125)
    assert fused["out"].shape == (0, 2, 50, 64)
    assert lse.shape == (0, 2, 50)


@pytest.mark.skipif(DEVICE == "cpu", reason="4 GB of input: too much to interpret")
def test_offsets_past_two_to_the_31():
    heads, tokens, dim = 16, 197, 64
    batch = 2**31 // (tokens * 3 * heads * dim) + 2
    qkv = torch.empty(batch, tokens, 3, heads, dim, dtype=BF16, device=DEVICE)
    grads = torch.empty_like(qkv)
    qkv[-1].normal_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out, lse = kernels.attention_fwd(q, k, v, 0.125)
    dout = torch.randn_like(out)
    dq, dk, dv = grads.permute(2, 0, 3, 1, 4).unbind(0)
    kernels.attention_bwd(dout, q, k, v, out, lse, 0.125, dq, dk, dv)
    exact = torch_run(reference.attention, q[-1:], k[-1:], v[-1:], dout[-1:], 0.125, torch.float64)
    eager = torch_run(F.scaled_dot_product_attention, q[-1:], k[-1:], v[-1:], dout[-1:], 0.125, BF16)
    for name, value in {"out": out, "dq": dq, "dk": dk, "dv": dv}.items():
        assert_as_accurate(value[-1:], eager[name], exact[name], name)


def far_apart(tokens, dim, dtype):
    """Packed q, k, v of two samples more than 2^31 elements apart: address space, hardly any memory."""
    gap, row = 2**31 + 8, 3 * dim
    buffer = torch.empty(gap + tokens * row, dtype=dtype, device=DEVICE)
    qkv = buffer.as_strided((2, tokens, 3, 1, dim), (gap, row, dim, dim, 1))
    qkv.copy_(torch.randn(qkv.shape))
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize(("tokens", "dtype"), [(20, BF16), (260, BF16), (20, FP32)], ids=str)
def test_index_arithmetic_past_two_to_the_31(tokens, dtype):
    """An offset of 32 bits would read, and write, somewhere else."""
    assert_parity(*far_apart(tokens, 64, dtype), grads=far_apart(tokens, 64, dtype))


def test_rows_of_a_head_further_apart_than_32_bits_count():
    """Tokens first, as (N, B, H, D) with a large B: an offset of 32 bits would wrap around."""
    gap, tokens = 2**26 + 8, 40
    buffer = torch.empty(gap * tokens, dtype=BF16, device=DEVICE)
    far = buffer.as_strided((tokens, 3, 1, 32), (gap, 32, 32, 1)).copy_(torch.randn(tokens, 3, 1, 32))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in far.unbind(1))
    assert_parity(q, k, v, grads=nan_like(*(tensor.contiguous() for tensor in (q, k, v))))


def test_refusals():
    q, k, v = packed(1, 4, 1, 32, FP32)
    with pytest.raises(ValueError, match=r"scale is -1.0, expected a number > 0"):
        kernels.attention_fwd(q, k, v, -1.0)
    with pytest.raises(ValueError, match=r"scale is nan"):
        kernels.attention_fwd(q, k, v, math.nan)
    for dim in (24, 36, 136):
        with pytest.raises(ValueError, match=f"q has head dim {dim}, expected a multiple of 8 from 32 to 128"):
            kernels.attention_fwd(*packed(1, 4, 1, dim, FP32), 1.0)
    out, lse = kernels.attention_fwd(q, k, v, 1.0)
    turned = torch.empty(1, 1, 32, 4, device=DEVICE).transpose(2, 3)
    with pytest.raises(ValueError, match=r"dk has stride 4 in its last dimension, expected 1"):
        kernels.attention_bwd(out, q, k, v, out, lse, 1.0, torch.empty_like(q), turned, torch.empty_like(v))


def test_settings_cover_every_size():
    for dim, keys, dtype, arch in product(range(32, 129, 8), range(1, 300), (FP32, BF16), (80, 90)):
        for kernel in ("fwd", "bwd", "bwd_dq"):
            settings = attention_settings(kernel, dtype, dim, keys, arch)
            assert sum(settings.cols) >= dim > sum(settings.cols[:-1])
            assert settings.short or settings.block_n
            if settings.short:  # only the last tile may be ragged: the others are read as full
                assert sum(settings.keys) >= keys > sum(settings.keys[:-1])


def test_power_of_two_parts():
    assert power_of_two_parts(197, 16, 3) == (128, 64, 16)
    assert power_of_two_parts(240, 16, 3) == (256,)
    assert power_of_two_parts(80, 16, 2) == (64, 16)
    assert power_of_two_parts(120, 16, 2) == (128,)


def test_calibration_of_the_traffic_moves_every_value():
    spec = importlib.util.spec_from_file_location("attention_traffic", ROOT / "benchmarks" / "attention_traffic.py")
    traffic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(traffic)
    for name, (q, k, v, out, *heads) in traffic.forms(2, 4, 21, 32, torch.device(DEVICE), BF16).items():
        traffic.traffic(q, k, v, out.fill_(float("nan")), *heads)
        torch.testing.assert_close(out.float(), q.float() + k.float() + v.float(), rtol=2**-7, atol=0.0, msg=name)
