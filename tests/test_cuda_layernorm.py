"""LayerNorm's CUDA kernels against float64, on a GPU and as fibers on the CPU (cuda_device.py)."""

import cuda_on_cpu
import cuda_passes
import pytest
import torch
from cuda_device import DEVICES, PAIRS, Device, prove, rows_for

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS = [33, 192, 768, 1280, 4304]


@pytest.fixture(params=DEVICES)
def device(request):
    return Device(request.param)


@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
@pytest.mark.parametrize("width", WIDTHS)
def test_layernorm_fwd(device, width, x_dtype, dtype):
    for rows in rows_for(device, width):
        x = device.draw(rows, width, dtype=x_dtype, scale=2.0, shift=0.5)
        weight, bias = device.draw(width, dtype=dtype), device.draw(width, dtype=dtype)
        prove(device, "layernorm_fwd", x, weight, bias, 1e-6, dtype)
        prove(device, "layernorm_fwd", x, weight.to(F32), None, 1e-6, dtype)
        prove(device, "layernorm_fwd", x, None, None, 1e-5, dtype)


def test_layernorm_fwd_of_a_far_mean(device):
    """Sums of squares would cancel here; squares of centred values do not."""
    x = device.draw(16, 768, shift=1000.0)
    y, *_ = prove(device, "layernorm_fwd", x, None, None, 1e-6, F32)
    assert (y.std(dim=1, unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
@pytest.mark.parametrize("width", WIDTHS)
def test_layernorm_bwd(device, width, x_dtype, dtype):
    for rows in rows_for(device, width):
        x = device.draw(rows, width, dtype=x_dtype, scale=2.0, shift=0.5)
        dy, dresidual = device.draw(rows, width, dtype=dtype), device.draw(rows, width, dtype=x_dtype)
        weight, bias = device.draw(width, dtype=dtype), device.draw(width, dtype=dtype)
        mean, rstd = cuda_passes.layernorm_fwd(x, None, None, 1e-6, dtype)[1:]
        prove(device, "layernorm_bwd", dy, x, mean, rstd, weight, bias, dresidual, True, True)
        prove(device, "layernorm_bwd", dy, x, mean, rstd, weight.to(F32), None, None, True, False)
        prove(device, "layernorm_bwd", dy, x, mean, rstd, None, None, None, False, True)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "at_once"),
    [(BF16, BF16, False), (BF16, BF16, True), (F32, F16, False), (F32, F32, False)],
)
@pytest.mark.parametrize("width", [200, 384, 768, 1000, 1536, 2048, 3584, 3592, 4096, 4104])
def test_layernorm_fetches_rows_ahead(device, width, x_dtype, dtype, at_once, monkeypatch):
    """Every way to hold a row, several rows a warp; copies made as late, and as early, as a GPU may make them."""
    monkeypatch.setenv(cuda_on_cpu.MORE, "1")
    if at_once:
        monkeypatch.setenv(cuda_on_cpu.COPIES_AT_ONCE, "1")
    rows = 37 if width <= 1024 else 11
    x, dy = device.draw(rows, width, dtype=x_dtype, scale=2.0, shift=0.5), device.draw(rows, width, dtype=dtype)
    weight, bias = device.draw(width, dtype=dtype), device.draw(width, dtype=dtype)
    _, mean, rstd = prove(device, "layernorm_fwd", x, weight, bias, 1e-6, dtype)
    dresidual = device.draw(rows, width, dtype=x_dtype)
    prove(device, "layernorm_bwd", dy, x, mean, rstd, weight, bias, dresidual, True, True)


@pytest.mark.parametrize("rows", [1, 2, 3, 45, 131])
def test_layernorm_bwd_of_any_number_of_rows(device, rows):
    """Warps walk over the rows: none may be missed or counted twice."""
    x, dy = device.draw(rows, 256), device.draw(rows, 256)
    mean, rstd = cuda_passes.layernorm_fwd(x, None, None, 1e-6, F32)[1:]
    prove(device, "layernorm_bwd", dy, x, mean, rstd, device.draw(256), device.draw(256), None, True, True)


def test_layernorm_backward_writes_the_forward_again(device):
    """The y of the backward is the forward's, to the bit."""
    x, weight, bias = device.draw(9, 768, dtype=BF16), device.draw(768, dtype=BF16), device.draw(768, dtype=BF16)
    y, mean, rstd = device.ops.layernorm_fwd(x, weight, bias, 1e-6, BF16)
    again = device.ops.layernorm_bwd(torch.zeros_like(x), x, mean, rstd, weight, bias, None, False, True)[3]
    assert torch.equal(again, y)
