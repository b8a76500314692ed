"""Every pass of csrc/cuda but LayerNorm against float64, on a GPU and as fibers on the CPU (cuda_device.py)."""

import pytest
import torch
from cuda_device import DEVICES, PAIRS, Device, prove, rows_for

from fastvit import reference, testing
from fastvit.ops import _cuda, _sm90

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BATCHES = [(0, 5), (1, 1), (3, 17)]  # samples, tokens


@pytest.fixture(params=DEVICES)
def device(request):
    return Device(request.param)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("width", [33, 192, 4304])
def test_activation(device, width, dtype, act):
    for rows in rows_for(device, width):
        h, da = device.draw(rows, width, dtype=dtype, scale=2.0), device.draw(rows, width, dtype=dtype)
        fresh = torch.full_like(h, float("nan"))
        prove(device, "act_fwd", h, fresh.clone(), act, mutated=[1])
        prove(device, "act_bwd", da.clone(), h, fresh.clone(), act, dtype, mutated=[0, 2])
        prove(device, "act_bwd", da.clone(), h, None, act, dtype, mutated=[0])
        prove(device, "act_bwd", da.clone(), h, fresh.clone(), act, None, mutated=[0, 2])


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_activation_in_place(device, dtype, act):
    h = device.draw(33, 64, dtype=dtype)
    apart = torch.empty_like(h)
    device.ops.act_fwd(h, apart, act)
    device.ops.act_fwd(h, h, act)
    assert torch.equal(h, apart)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_activation_far_out(device, dtype, act):
    """Large values of both signs give h and 0, with slope 1 and 0; NaN stays NaN."""
    h = torch.tensor([[30.0, -30.0, 300.0, -300.0, 6e4, -6e4, 0.0, float("nan")]], dtype=dtype, device=device.name)
    a = torch.empty_like(h)
    da = torch.ones_like(h)
    device.ops.act_fwd(h, a, act)
    device.ops.act_bwd(da, h, None, act, None)
    expected = torch.where(h > 0, h, 0.0)
    torch.testing.assert_close(a[0, :7], expected[0, :7], rtol=0, atol=1e-15)
    slopes = torch.tensor([1, 0, 1, 0, 1, 0, 0.5], dtype=dtype, device=device.name)
    torch.testing.assert_close(da[0, :7], slopes, rtol=0, atol=1e-15)
    assert a[0, 7].isnan()
    assert da[0, 7].isnan()


@pytest.mark.parametrize(("out_dtype", "dtype"), PAIRS)
@pytest.mark.parametrize("width", [33, 768])
def test_scale_residual(device, width, out_dtype, dtype):
    for samples, tokens in BATCHES:
        rows = samples * tokens
        branch, residual = device.draw(rows, width, dtype=dtype), device.draw(rows, width, dtype=out_dtype)
        layer_scale, row_scale = device.draw(width, dtype=dtype), device.draw(samples, dtype=dtype)
        for scales in ((layer_scale, row_scale), (layer_scale.to(F32), None), (None, row_scale.to(F32)), (None, None)):
            prove(device, "scale_residual_fwd", branch, residual, *scales, out_dtype)
        prove(device, "scale_residual_fwd", branch, None, layer_scale, row_scale, out_dtype)


@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
@pytest.mark.parametrize("width", [33, 768])
def test_scale(device, width, x_dtype, dtype):
    for samples, tokens in BATCHES:
        x = device.draw(samples * tokens, width, dtype=x_dtype)
        row_scale, column_scale = device.draw(samples, dtype=dtype), device.draw(width, dtype=dtype)
        prove(device, "scale", x, row_scale, None, dtype, F32)
        prove(device, "scale", x, row_scale.to(F32), column_scale, dtype, dtype)
        prove(device, "scale", x, None, column_scale.to(F32), dtype, None)
    weight, per_row = device.draw(48, width, dtype=dtype), device.draw(48, dtype=dtype)
    prove(device, "scale", weight, per_row, None, dtype, None)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("width", [33, 192, 2304])
def test_column_sum(device, width, dtype):
    for rows in rows_for(device, width):
        x = device.draw(rows, width, dtype=dtype, shift=0.2)
        prove(device, "column_sum", x, dtype)
        prove(device, "column_sum", x, F32)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("width", [33, 768])
def test_layer_scale_bwd(device, width, dtype):
    g, weight = device.draw(80, width), device.draw(80, width, dtype=dtype)
    bias, sums, layer_scale = device.draw(80, dtype=dtype), device.draw(80), device.draw(80, dtype=dtype)
    prove(device, "layer_scale_bwd", g, weight, bias, sums, layer_scale)
    prove(device, "layer_scale_bwd", g, weight, None, sums, layer_scale.to(F32))
    prove(device, "layer_scale_bwd", g, weight, bias, None, layer_scale)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [192, 200])
def test_sliced_rows(device, width, dtype):
    """Rows of a larger buffer, NaN around them; in the eight-wide and in the one-wide kernels."""
    rows = 37

    def part(*size):
        return device.draw(*size, dtype=dtype, slices=True)

    x, dy, dresidual = part(rows, width), part(rows, width), part(rows, width)
    weight, bias = device.draw(width, dtype=dtype), device.draw(width, dtype=dtype)
    _, mean, rstd = prove(device, "layernorm_fwd", x, weight, bias, 1e-6, dtype)
    prove(device, "layernorm_bwd", dy, x, mean, rstd, weight, bias, dresidual, True, True)
    prove(device, "act_bwd", part(rows, width), x, part(rows, width), "gelu", dtype, mutated=[0, 2])
    prove(device, "scale_residual_fwd", x, dresidual, weight, None, dtype)
    prove(device, "scale", x, None, weight, dtype, F32)
    prove(device, "column_sum", x[:, 1:], dtype)
    prove(device, "layernorm_fwd", x[:, 3:], weight[3:], bias[3:], 1e-6, dtype)


def test_same_results_every_time(device):
    rows = 50432 if device.name == "cuda" else 70
    x, dy = device.draw(rows, 768, dtype=BF16), device.draw(rows, 768, dtype=BF16)
    weight, bias = device.draw(768, dtype=BF16), device.draw(768, dtype=BF16)
    _, mean, rstd = device.ops.layernorm_fwd(x, weight, bias, 1e-6, BF16)

    def run():
        da = dy.clone()
        return (
            *device.ops.layernorm_bwd(dy, x, mean, rstd, weight, bias, dy, True, True),
            device.ops.act_bwd(da, x, None, "gelu", F32),
            *device.ops.scale(x, None, weight, BF16, F32),
            device.ops.column_sum(x, F32),
        )

    first = run()
    for _ in range(3):
        for got, wanted in zip(run(), first, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", ["layernorm_linear", "linear_residual", "layernorm_mlp"])
def test_ops_on_the_kernels(device, op, dtype, capability, monkeypatch):
    """The whole op: passes and products together, output and every gradient, beside stock PyTorch."""
    if device.name == "cuda" and capability != (9, 0):
        pytest.skip("a GPU has the capability it has: once is enough")
    if device.name == "cuda":
        import fastvit

        inputs = testing.make_inputs(op, testing.VIT_SHAPES["base"], 4, dtype, "cuda")
        with fastvit.use_backend("cuda"):
            testing.assert_op_as_accurate(op, getattr(fastvit.ops, op), inputs)
        return
    inputs = testing.make_inputs(op, testing.Shape(48, 3, 96, 17), 3, dtype)
    testing.assert_op_as_accurate(op, on_the_kernels(op, device, capability, monkeypatch), inputs)


def on_the_kernels(op, device, capability, monkeypatch):
    """The op on the CPU, composed as on a GPU of this capability."""
    import test_cuda_composition as composition

    monkeypatch.setattr(_cuda, "ops", device.ops)
    monkeypatch.setattr(_sm90, "device_facts", lambda index: (capability, 132))
    monkeypatch.setattr(_cuda, "_float32_product", lambda a, b: a.float() @ b.float())
    return composition.fused(op)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("op", ["layernorm_linear", "linear_residual", "layernorm_mlp"])
def test_parameters_of_any_strides(device, op, capability, monkeypatch):
    """Columns of a matrix, one number expanded, a transposed weight: what PyTorch takes, the kernels take."""
    if device.name == "cuda":
        import fastvit

        monkeypatch.setattr(fastvit.dispatch, "_choice", {"*": "cuda"})
        fused = getattr(fastvit.ops, op)
    else:
        fused = on_the_kernels(op, device, capability, monkeypatch)
    inputs = testing.make_inputs(op, testing.Shape(48, 3, 96, 17), 3, BF16, device.name)
    for name, value in inputs.items():
        if value.dim() == 1:
            column = torch.zeros(value.shape[0], 2, dtype=BF16, device=device.name)[:, 1].copy_(value.detach())
            inputs[name] = column.requires_grad_()
        elif value.dim() == 2:
            inputs[name] = value.detach().t().contiguous().t().requires_grad_()
    if "layer_scale" in inputs:
        inputs["layer_scale"] = torch.full((1,), 0.5, dtype=BF16, device=device.name).expand(48).requires_grad_()
    testing.assert_op_as_accurate(op, fused, inputs)


def test_errors_name_tensor_rule_and_what_came(device):
    x, w = device.draw(4, 8), device.draw(8)
    ops = device.ops
    with pytest.raises(RuntimeError, match=r"layernorm_fwd: weight has shape \(7\), expected \(8\) like x"):
        ops.layernorm_fwd(x, w[:7], None, 1e-6, F32)
    with pytest.raises(RuntimeError, match="layernorm_fwd: the result is float64, expected float32, float16 or bfloat"):
        ops.layernorm_fwd(x, w, None, 1e-6, torch.float64)
    with pytest.raises(RuntimeError, match="x has 16 bits, expected float32 or the dtype of the result"):
        ops.layernorm_fwd(x.to(BF16), None, None, 1e-6, F16)
    with pytest.raises(RuntimeError, match=r"x has shape \(8\), expected \(rows, columns\)"):
        ops.column_sum(w, F32)
    with pytest.raises(RuntimeError, match=r"x has strides \(1, 8\), expected 1 for the last dimension"):
        ops.column_sum(x.t(), F32)
    with pytest.raises(RuntimeError, match=r"row_scale has shape \(3\), expected one factor a sample of 4 rows"):
        ops.scale(x, w[:3], None, F32, None)
    with pytest.raises(RuntimeError, match="act is 'relu', expected 'gelu', 'gelu_tanh' or 'quick_gelu'"):
        ops.act_fwd(x, x, "relu")
    with pytest.raises(RuntimeError, match=r"mean has shape \(3\), expected \(4\) like the rows of dy"):
        ops.layernorm_bwd(x, x, w[:3], w[:4], None, None, None, True, True)
