"""The CUDA kernels at ViT's widths beside stock PyTorch in the same dtype, with and without outlier channels.

Trained ViTs have channels a hundred times larger than the others. The gates are held over all channels and over the
ordinary ones alone: an outlier's error must not hide theirs.
"""

import cuda_on_cpu
import cuda_passes
import pytest
import torch
import torch.nn.functional as F
from cuda_device import DEVICES, Device, prove
from test_cuda_composition import chained_product
from test_cuda_kernels import on_the_kernels

import fastvit
from fastvit import reference, testing
from fastvit.ops import _cuda

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
SHAPES = [(1576, 192), (394, 384), (394, 768), (197, 1024), (197, 1280)]  # rows and width
OUTLIERS = 97  # every so many channels


@pytest.fixture(params=DEVICES)
def device(request):
    return Device(request.param)


@pytest.fixture(params=[False, True], ids=["ordinary", "outliers"])
def draw(request, device):
    """Random matrices, with a hundredfold in the outlier channels; those have a mean of that size too."""

    def draw(*size, dtype, scale=1.0, shift=0.3):
        values = device.draw(*size, scale=scale, shift=shift)
        if request.param:
            values[..., ::OUTLIERS] *= 100
        return values.to(dtype)

    return draw


def channels(width):
    """All of them, and those between the outliers."""
    index = torch.arange(width)
    return {"all": index, "ordinary": index[index % OUTLIERS > 0]}


def hold(ours, stock, exact, **names):
    """Both gates for each result, over all channels and over the ordinary ones."""
    for name, got, eager, wanted in zip(names, ours, stock, exact, strict=True):
        for kind, chosen in channels(got.shape[-1]).items():
            chosen = chosen.to(got.device)
            testing.assert_as_accurate(got[..., chosen], eager[..., chosen], wanted[..., chosen], f"{name}, {kind}")


def in_dtype(function, dtype, *given):
    """``function`` and the gradients of its inputs but the last, which is that of its result."""
    *inputs, grad = (t.detach().to(dtype).requires_grad_() for t in given)
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_layernorm(draw, device, rows, width, dtype):
    x, dy = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype)
    weight, bias = device.draw(width, scale=0.2, shift=1.0, dtype=dtype), device.draw(width, scale=0.2, dtype=dtype)
    y, mean, rstd = device.ops.layernorm_fwd(x, weight, bias, 1e-6, dtype)
    dx, dweight, dbias, _ = device.ops.layernorm_bwd(dy, x, mean, rstd, weight, bias, None, True, False)

    def stock(*given):
        return F.layer_norm(given[0], (width,), *given[1:], 1e-6)

    given = (x, weight, bias, dy)
    eager, exact = in_dtype(stock, dtype, *given), in_dtype(stock, torch.float64, *given)
    hold((y, dx, dweight, dbias), eager, exact, y=0, dx=0, dweight=0, dbias=0)
    # a stricter judge than stock on a CPU, which adds a column row by row
    prove(device, "layernorm_bwd", dy, x, mean, rstd, weight, bias, x, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_column_sums(draw, device, rows, width, dtype):
    for cols in (width, 4 * width):
        x = draw(rows, cols, dtype=dtype)
        for into in {dtype, F32}:
            sums = device.ops.column_sum(x, into)
            hold([sums], [x.to(into).sum(0)], [x.double().sum(0)], sums=0)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1576, 192), (197, 768), (197, 1280)])
def test_activation_and_its_bias_gradient(draw, device, rows, width, dtype, act):
    """fc1's bias is summed from the unrounded gradients, in the pass that makes them."""
    h, da = draw(rows, 4 * width, dtype=dtype, shift=0.0), draw(rows, 4 * width, dtype=dtype)
    dh, a = da.clone(), torch.full_like(h, float("nan"))
    sums = device.ops.act_bwd(dh, h, a, act, dtype)

    def results(dtype):
        y, grad = in_dtype(lambda h: reference.activation(h, act), dtype, h, da)
        return y, grad, grad.sum(0)

    def once_rounded():
        dh, a = da.clone(), torch.empty_like(h)
        return a, dh, cuda_passes.act_bwd(dh, h, a, act, dtype)

    # the three calls that are stock's quick_gelu overflow float16 where an outlier meets an outlier
    eager = once_rounded() if act == "quick_gelu" and dtype == F16 else results(dtype)
    hold((a, dh, sums), eager, results(torch.float64), a=0, dh=0, sums=0)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("rows", "width", "tile"), [(394, 192, "large"), (197, 384, "small")])
def test_bias_gradient_of_the_epilogue(draw, device, rows, width, tile, dtype, act):
    """Sums of a tile's rows, then of the tiles, at fc1's width; the product before them is kept short."""
    if not hasattr(device.ops, "linear_act_grad") or (device.name == "cuda" and not is_hopper()):
        pytest.skip("Hopper's products run on compute capability 9.0")
    dy, weight = device.draw(rows, 16, dtype=dtype), draw(16, 4 * width, dtype=dtype, scale=16**-0.5, shift=0.0)
    h = draw(rows, 4 * width, dtype=dtype, shift=0.0)

    def meaning(dtype, into):
        given = (dy.to(dtype), weight.to(dtype), h.to(dtype))
        return cuda_passes.linear_act_grad(*given, act, True, into)

    ours, exact = (
        device.ops.linear_act_grad(dy, weight, h, act, True, dtype, tile),
        meaning(torch.float64, torch.float64),
    )
    hold(ours, meaning(dtype, dtype), exact, dh=0, a=0, sums=0)
    if act == "gelu" or device.name == "cuda":  # approximations, good for 16 bits
        return
    sums = device.ops.linear_act_grad(dy, weight, h, act, True, F32, tile)[2]
    hold([sums], [meaning(dtype, F32)[2]], [exact[2]], sums=0)


def is_hopper():
    return torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1576, 192), (197, 768)])
def test_layer_scale_gradient(draw, device, rows, width, dtype, monkeypatch):
    """It comes from the weight's gradient, stock's from the branch. The op's other gradients on the way."""
    given = {
        "x": draw(rows, width, dtype=dtype),
        "weight": device.draw(width, width, scale=width**-0.5, dtype=dtype),
        "bias": device.draw(width, scale=0.1, dtype=dtype),
        "residual": device.draw(rows, width, dtype=dtype),
        "layer_scale": device.draw(width, scale=0.2, shift=0.5, dtype=dtype),
    }
    given = {name: value.requires_grad_() for name, value in given.items()}
    if device.name == "cuda":
        monkeypatch.setattr(fastvit.dispatch, "_choice", {"*": "cuda"})
        fused = fastvit.ops.linear_residual
    else:
        fused = on_the_kernels("linear_residual", device, (8, 0), monkeypatch)
    testing.assert_op_as_accurate("linear_residual", fused, given)


@pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())
@pytest.mark.parametrize(("rows", "depth"), [(591, 768), (1576, 192), (3153, 768)])
def test_layer_scale_gradient_of_long_sums(rows, depth, monkeypatch):
    """In float32, on products that add one term after another: no worse than stock's however many rows there are."""
    device, cols = Device("cpu"), 192
    x, dout = device.draw(rows, depth), device.draw(rows, cols)
    weight, bias = device.draw(cols, depth, scale=depth**-0.5), device.draw(cols, scale=0.1)
    exact = (dout.double() * F.linear(x.double(), weight.double(), bias.double())).sum(0)
    stock = (dout * (chained_product(x, weight.t()) + bias)).sum(0)
    monkeypatch.setattr(_cuda, "ops", device.ops)
    monkeypatch.setattr(F, "linear", lambda a, weight, bias: chained_product(a, weight.t()) + bias)
    layer_scale, mask = device.draw(cols, scale=0.2, shift=0.5), [False, False, False, True]
    ours = _cuda.linear_residual_bwd(dout, x, weight, bias, layer_scale, None, mask)[3]
    testing.assert_as_accurate(ours, stock, exact, "layer_scale", factor=1.1)
