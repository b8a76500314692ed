"""The activations of the compiled CPU ops, value by value: bfloat16 GELU may be as coarse as its result."""

import pytest
import torch

from fastvit import reference

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
SIDE = 512


def gelu(h):
    """``layernorm_mlp``'s GELU of ``h``, (n,) bfloat16: nothing for fc1 to add to its bias, fc2 the identity."""
    x, fc1 = torch.zeros(1, SIDE, dtype=h.dtype), torch.zeros(SIDE, SIDE, dtype=h.dtype)
    identity = torch.eye(SIDE, dtype=h.dtype)
    out = [
        C.layernorm_mlp_fwd(x, None, None, fc1, part, identity, None, None, None, "gelu", 1e-6, False, False, False)[0]
        for part in h.split(SIDE)
    ]
    return torch.cat(out, dim=1)[0]


def every_value():
    """Every finite bfloat16 up to 2^10, in whole lots of SIDE."""
    h = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    h = h[h.isfinite() & (h.abs() <= 1024)]
    return torch.cat([h, h.new_zeros(-len(h) % SIDE)])


def test_gelu_rounds_to_a_neighbour():
    """Rounded, it is the exact result's rounding or, seldom, the value next to it."""
    h = every_value()
    y = gelu(h).double()
    wanted = h.double() * 0.5 * torch.erfc(-h.double() * 0.5**0.5)
    correct, unit = wanted.to(torch.bfloat16).double(), torch.finfo(torch.bfloat16).eps * wanted.abs()
    inner = (h >= -6) & (wanted.abs() > torch.finfo(torch.bfloat16).tiny)
    assert ((y - correct).abs() <= unit)[inner].all()
    assert (y != correct)[inner].double().mean() < 0.02
    assert ((y - wanted).abs() <= 1e-8)[h < -6].all()
    assert ((y - wanted).abs() <= 2e-38)[(h >= -6) & (wanted.abs() <= torch.finfo(torch.bfloat16).tiny)].all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_and_nan(value):
    """One value among the others; the identity's zeros times it are NaN, so it is read at one column alone."""
    fc2 = torch.zeros(SIDE, SIDE, dtype=torch.bfloat16)
    x, fc1, bias = fc2[:1], fc2, torch.full((SIDE,), value, dtype=torch.bfloat16)
    fc2 = torch.full_like(fc2, 1.0)
    y = C.layernorm_mlp_fwd(x, None, None, fc1, bias, fc2, None, None, None, "gelu", 1e-6, False, False, False)[0]
    assert torch.equal(y.isnan(), torch.full_like(y, value != value, dtype=torch.bool))
    assert value != value or (y == value).all()


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_slopes(act):
    """The gradient of fc1's bias is the slope where fc2 is the identity. 1 - sigmoid of a large value would cancel."""
    h = torch.linspace(-12, 12, SIDE)[None]
    x, fc1, dout = torch.zeros(1, SIDE), torch.zeros(SIDE, SIDE), torch.ones(1, SIDE)
    mask = [False, False, False, False, True, False, False, False]
    given = (None, None, fc1, torch.eye(SIDE), None, None, None)
    slope = C.layernorm_mlp_bwd(dout, x, torch.zeros(1), torch.ones(1), h, *given, act, False, mask)[4]
    exact = h.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.activation(exact, act).sum(), exact)
    assert (slope.double() - wanted[0]).abs().max() <= 4e-7


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_slopes_in_bfloat16(act):
    """Every value; rounded, the slope is within one unit of the exact one, or 6e-5 where it crosses zero."""
    eye, ones, zeros = torch.eye(SIDE).bfloat16(), torch.ones(1, SIDE).bfloat16(), torch.zeros(SIDE, SIDE).bfloat16()
    mask = [False, False, False, False, True, False, False, False]
    given = (None, None, zeros, eye, None, None, None)
    h = every_value().view(-1, 1, SIDE)
    slopes = [C.layernorm_mlp_bwd(ones, zeros[:1], *torch.ones(2, 1), part, *given, act, False, mask)[4] for part in h]
    exact = h.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.activation(exact, act).sum(), exact)
    error = (torch.stack(slopes).double() - wanted[:, 0]).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps * wanted[:, 0].abs() + 6e-5).all()
