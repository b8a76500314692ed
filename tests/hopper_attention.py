"""What the tests of Hopper's attention share: inputs, the proof against float64, and the model as a backend."""

import sys

import cuda_on_cpu
import torch
import torch.nn.functional as F

from fastvit import reference, testing
from fastvit.ops import _sm90

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HAS_KERNEL = IS_HOPPER and hasattr(torch.ops.fastvit_cuda, "attention_packed_fwd")
HAS_BWD = IS_HOPPER and hasattr(torch.ops.fastvit_cuda, "attention_bwd")
DIM = 64
ORDER, WITHOUT = "FASTVIT_CUDA_ON_CPU_ORDER", "FASTVIT_CUDA_ON_CPU_WITHOUT"
OP = sys.modules["fastvit.ops.attention"]  # the module; fastvit.ops.attention is the op


def ops_of(device):
    return torch.ops.fastvit_cuda if device == "cuda" else cuda_on_cpu.attention()


def draw(*size, dtype=BF16, device="cpu", scale=1.0, seed=0):
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def packed(batch, tokens, heads, dtype=BF16, device="cpu", scale=1.0, dim=DIM):
    return draw(batch, tokens, 3 * heads * dim, dtype=dtype, device=device, scale=scale, seed=tokens)


def prove(out, lse, q, k, v, scale=DIM**-0.5):
    """``out (B, Nq, H, D)`` and ``lse (B, H, Nq)`` against float64, beside what stock PyTorch is off."""
    wide = [t.double() for t in (q, k, v)]
    exact = reference.attention(*wide, scale=scale).transpose(1, 2)
    stock = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    assert out.dtype == q.dtype
    assert lse.dtype == F32
    testing.assert_as_accurate(out, stock, exact, "out")
    scores = wide[0] @ wide[1].mT * scale
    error = (lse.double() - scores.logsumexp(-1)).abs().max()
    assert error <= 2e-6 * scores.abs().amax().clamp(min=8)


# What every kernel on this layer needs
INSTRUCTIONS = (
    "wait",
    "arrive",
    "named_sync",
    "named_arrive",
    "products_begin",
    "products_commit",
    "products_wait",
    "sync_block",
)


def is_found_without(instruction, monkeypatch, prove_one):
    """Whether the kernel fails or its result is wrong, in one of five orders, where this instruction does nothing."""
    monkeypatch.setenv(WITHOUT, instruction)
    for order in range(5):
        monkeypatch.setenv(ORDER, str(order))
        try:
            prove_one()
        except (AssertionError, RuntimeError):
            return True
    return False


def inputs_of_bwd(q, k, v, dout, scale=DIM**-0.5):
    """What the backward is given besides: the forward's results, rounded once."""
    wide = [t.double() for t in (q, k, v)]
    out = reference.attention(*wide, scale=scale).to(q.dtype)
    lse = (wide[0] @ wide[1].mT * scale).logsumexp(-1).float()
    return dout, q, k, v, out, lse, scale


def prove_bwd(grads, q, k, v, dout, scale=DIM**-0.5):
    """``(dq, dk, dv)`` against float64, beside what stock PyTorch is off."""

    def differentiate(attend, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(attend(*leaves, scale=scale), leaves, dout.to(dtype))

    exact = differentiate(reference.attention, torch.float64)
    stock = differentiate(F.scaled_dot_product_attention, q.dtype)
    for name, *three in zip(("dq", "dk", "dv"), grads, stock, exact, strict=True):
        assert three[0].dtype == q.dtype
        testing.assert_as_accurate(*three, name)


def stand_in(monkeypatch, library=cuda_on_cpu.attention):
    """Let the op run on CPU tensors, on the model or another library's kernel."""
    monkeypatch.setattr(OP, "_hopper", library)
    monkeypatch.setattr(OP._contract, "why_not_compiled", lambda *_: [])
    monkeypatch.setattr(_sm90, "why_not_built", lambda *_: [])
    monkeypatch.setattr(_sm90.why_not_attention, "__defaults__", (library(),))
