"""Triton attention of one to four queries, the class token's case. Needs CUDA or TRITON_INTERPRET=1."""

import os

import pytest
import torch
import torch.nn.functional as F

from fastvit import ops, reference
from fastvit.dispatch import use_backend
from fastvit.testing import assert_as_accurate, cast_inputs, run_with_gradients, sliced

pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels import attention_few as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET=1"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _only_the_kernels_for_few(monkeypatch):
    def other(*args):
        raise AssertionError("another kernel ran")

    from fastvit.kernels import attention

    monkeypatch.setattr(attention, "attention_fwd", other)
    monkeypatch.setattr(attention, "attention_bwd", other)
    with use_backend("triton"):
        yield


def heads(batch, num_heads, queries, keys, dim, dtype):
    sizes = {"q": queries, "k": keys, "v": keys}
    return {
        name: torch.randn(batch, num_heads, size, dim).to(DEVICE, dtype).requires_grad_()
        for name, size in sizes.items()
    }


def assert_parity(inputs):
    dout = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["q"])
    ours = run_with_gradients(ops.attention, inputs, dout)
    eager = run_with_gradients(F.scaled_dot_product_attention, named(inputs), dout)
    exact = run_with_gradients(reference.attention, cast_inputs(inputs, torch.float64), dout)
    for name, value in ours.items():
        stock = name.replace("grad_q", "grad_query").replace("grad_k", "grad_key").replace("grad_v", "grad_value")
        assert_as_accurate(value, eager[stock], exact[name], name)


def named(inputs):
    return dict(zip(("query", "key", "value"), inputs.values(), strict=True))


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "dtype"),
    [(1, 197, 64, FP32), (1, 197, 64, BF16), (1, 257, 80, FP16), (1, 50, 32, BF16), (1, 65, 128, FP32),
     (1, 577, 72, BF16), (2, 198, 64, BF16), (3, 70, 40, FP32), (4, 33, 104, FP16), (2, 2, 64, BF16)],
    ids=str,
)  # fmt: skip
def test_parity(queries, keys, dim, dtype):
    assert_parity(heads(2, 2, queries, keys, dim, dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_one_query_and_one_key(dtype):
    inputs = heads(2, 3, 1, 1, 64, dtype)
    ours = run_with_gradients(ops.attention, inputs)
    assert torch.equal(ours["output"], inputs["v"])
    assert torch.equal(ours["grad_v"], torch.ones_like(ours["grad_v"]))
    assert max(ours["grad_q"].abs().max(), ours["grad_k"].abs().max()) < 1e-5


def test_a_slice_of_a_packed_projection():
    """The class token's query beside keys and values that were projected together; odd strides too."""
    q, kv = torch.randn(3, 1, 2 * 64).to(DEVICE, BF16), torch.randn(3, 50, 2, 2, 64).to(DEVICE, BF16)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    q = q.unflatten(-1, (2, 64)).transpose(1, 2)
    assert_parity({name: t.detach().requires_grad_() for name, t in (("q", q), ("k", k), ("v", v))})
    assert_parity({name: sliced(t) for name, t in heads(1, 2, 3, 21, 40, FP32).items()})
    odd = {name: torch.randn(1, 2, size, 43).to(DEVICE, BF16)[..., 3:] for name, size in (("q", 2), ("k", 9), ("v", 9))}
    assert_parity({name: t.requires_grad_() for name, t in odd.items()})


def test_scores_far_below_zero_and_far_apart():
    inputs = heads(1, 1, 1, 150, 64, BF16)
    with torch.no_grad():
        inputs["q"].mul_(0.1).add_(10)
        inputs["k"].mul_(0.1).sub_(10)
    assert_parity(inputs)
    with torch.no_grad():
        inputs["k"][:, :, ::7].mul_(-1)
    assert_parity(inputs)


def test_gradients_are_written_and_nothing_else():
    q, k, v = (t.detach() for t in heads(1, 2, 3, 21, 40, BF16).values())
    out, lse = kernels.attention_few_fwd(q, k, v, 0.2)
    buffer = torch.full((3, 2, 25, 48), float("nan")).to(DEVICE, BF16)
    dq, dk, dv = buffer[0, None, :, 1:4, :40], buffer[1, None, :, 2:23, :40], buffer[2, None, :, 2:23, :40]
    kernels.attention_few_bwd(torch.ones_like(out), q, k, v, out, lse, 0.2, dq, dk, dv)
    assert not any(grad.isnan().any() for grad in (dq, dk, dv))
    assert buffer.isnan().sum() == buffer.numel() - dq.numel() - dk.numel() - dv.numel()
    scores = q.double() @ k.double().transpose(-2, -1) * 0.2
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-5)


def test_index_arithmetic_past_two_to_the_31():
    """Two samples more than 2^31 elements apart: address space, hardly any memory."""
    gap, keys = 2**31 + 8, 20
    far = torch.empty(gap + keys * 128, dtype=BF16, device=DEVICE).as_strided(
        (2, keys, 2, 1, 64), (gap, 128, 64, 64, 1)
    )
    k, v = far.copy_(torch.randn(far.shape)).permute(2, 0, 3, 1, 4).unbind(0)
    q = torch.randn(2, 1, 1, 64).to(DEVICE, BF16)
    assert_parity({name: t.detach().requires_grad_() for name, t in (("q", q), ("k", k), ("v", v))})


def test_same_bits_every_run_and_no_images():
    inputs = heads(1, 2, 1, 197, 64, BF16)
    first, second = (run_with_gradients(ops.attention, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for value in run_with_gradients(ops.attention, heads(0, 2, 1, 5, 32, FP32)).values():
        assert value.shape[0] == 0
