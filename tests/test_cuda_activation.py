"""The kernels' activations, compiled for the host from csrc/cuda/activation.h, at every bfloat16 and float16 value."""

import ctypes
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest
import torch

from fastvit import reference

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """
#include "cuda/activation.h"
using namespace fastvit;
template <Activation ACT, bool FAST>
void run(const float* h, float* y, float* slope, int n) {
  for (int i = 0; i < n; ++i) {
    const Gate g = gate<ACT, FAST>(h[i]);
    y[i] = activate<ACT, FAST>(h[i]);
    slope[i] = g.value + h[i] * g.slope;
  }
}
extern "C" void activation(int act, int fast, const float* h, float* y, float* slope, int n) {
  if (act == 0) (fast ? run<Activation::kGelu, true> : run<Activation::kGelu, false>)(h, y, slope, n);
  if (act == 1) (fast ? run<Activation::kGeluTanh, true> : run<Activation::kGeluTanh, false>)(h, y, slope, n);
  if (act == 2) (fast ? run<Activation::kQuickGelu, true> : run<Activation::kQuickGelu, false>)(h, y, slope, n);
}
"""
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """h -> (act(h), act'(h)) in float32, by the kernels' source."""
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    folder = tmp_path_factory.mktemp("activation")
    (folder / "activation.cpp").write_text(SOURCE)
    command = ["nvcc", "-x", "c++", "-std=c++20", "-O1", "-shared", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "activation.cpp"), "-o", str(folder / "activation.so")], check=True)
    library = ctypes.CDLL(str(folder / "activation.so"))

    def run(h, act, fast=True):
        h = h.float().contiguous()
        y, slope = torch.empty_like(h), torch.empty_like(h)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (h, y, slope)]
        library.activation(reference.ACTIVATIONS.index(act), int(fast), *pointers, h.numel())
        return y, slope

    return run


def every_value(dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    return values[values.isfinite()]


def exact(h, act):
    """act(h) and act'(h) in float64, with the whole tail: 1 + erf cancels there."""
    h = h.double()
    if act != "gelu":
        h = h.requires_grad_()
        y = reference.activation(h, act)
        return y.detach(), torch.autograd.grad(y.sum(), h)[0]
    phi = 0.5 * torch.erfc(-h * 0.5**0.5)
    density = torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5
    return h * phi, phi + torch.where(density > 0, h * density, 0.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_is_below_the_resolution_of_16_bits(run, dtype):
    """Within 5e-5 of its own size to -6, then within 1e-9: half a unit is 2e-3 in bfloat16, 2.4e-4 in float16."""
    h = every_value(dtype)
    y, slope = run(h, "gelu")
    wanted, wanted_slope = exact(h, "gelu")
    error = (y.double() - wanted).abs()
    assert (error[h >= -6] <= 5e-5 * wanted[h >= -6].abs()).all()
    assert (error[h < -6] <= 1e-9).all()
    assert (slope.double() - wanted_slope).abs().max() <= 2.5e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gelu_rounds_to_a_neighbour(run, dtype):
    """Rounded, it is the exact result's rounding or the value next to it."""
    h = every_value(dtype)
    h = h[h >= -6]
    y, _ = run(h, "gelu")
    wanted, _ = exact(h, "gelu")
    rounded, correct = y.to(dtype).double(), wanted.to(dtype).double()
    unit = torch.finfo(dtype).eps * wanted.abs() + 2.0 ** (-24 if dtype == torch.float16 else -133)
    assert ((rounded - correct).abs() <= unit).all()
    normal = wanted.abs() > torch.finfo(dtype).tiny
    assert (rounded != correct)[normal].double().mean() < (0.01 if dtype == torch.bfloat16 else 0.1)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("fast", [True, False])
def test_every_activation_and_slope(run, act, fast):
    h = torch.cat([every_value(dtype).float() for dtype in HALVES])
    h = h[h.abs() < 1e4]
    y, slope = run(h, act, fast)
    wanted, wanted_slope = exact(h, act)
    bound = 5e-5 if fast and act == "gelu" else 2e-6
    assert ((y.double() - wanted).abs() <= bound * h.double().abs() + 1e-12).all()
    assert (slope.double() - wanted_slope).abs().max() <= 2 * bound


def test_infinities_and_nan(run):
    y, _ = run(torch.tensor([float("inf"), float("-inf"), float("nan")]), "gelu")
    assert y[0] == float("inf")
    assert y[1] == 0
    assert y[2].isnan()


def test_the_fit_is_the_tail_itself(run):
    """The polynomial's own error, on a fine grid instead of 16-bit values."""
    h = -torch.linspace(0, 6, 200_001)
    wanted, _ = exact(h, "gelu")
    y, _ = run(h, "gelu")
    relative = (y.double() - wanted).abs()[1:] / wanted.abs()[1:]
    assert relative.max() <= 5e-5
