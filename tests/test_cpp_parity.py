"""The compiled CPU ops against the reference: the output and every gradient, in every dtype they take."""

import cpp_ops
import pytest
import torch

from fastvit import reference
from fastvit.testing import (
    VIT_SHAPES,
    Shape,
    assert_op_as_accurate,
    cast_inputs,
    make_inputs,
    run_with_gradients,
    sliced,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = {"layernorm_linear": 3, "linear_residual": 1, "layernorm_mlp": 1}
ODD = Shape(33, 1, 71, 5)
SMALL = Shape(64, 1, 192, 50)


def check(op: str, inputs: dict, **options) -> None:
    assert_op_as_accurate(op, lambda **kwargs: getattr(cpp_ops, op)(**kwargs), {**inputs, **options})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SMALL, ODD, Shape(80, 1, 320, 197), VIT_SHAPES["tiny"]], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op, shape, dtype):
    check(op, make_inputs(op, shape, 2, dtype))


@pytest.mark.parametrize("op", OPS)
def test_base_width_in_float32(op):
    shape = Shape(768, 12, 3072, 197)
    check(op, make_inputs(op, shape, 1, torch.float32))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (1, 50), (1, 197), (3, 131), (1, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_row_counts(op, dtype, batch, tokens):
    check(op, make_inputs(op, Shape(48, 1, 96, tokens), batch, dtype))


@pytest.mark.parametrize("width", [15, 63, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_odd_widths(op, dtype, width):
    check(op, make_inputs(op, Shape(width, 1, 2 * width + 1, 7), 2, dtype))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("op", OPS)
def test_tiny_widths(op, width):
    # Too few values for the gates' statistics, and a LayerNorm over one or two values magnifies rounding by 1 / eps.
    inputs = make_inputs(op, Shape(width, 1, 2 * width + 1, 7), 2, torch.float32)
    meaning, fused = getattr(reference, op), getattr(cpp_ops, op)
    exact = run_with_gradients(meaning, cast_inputs(inputs, torch.float64))
    for name, value in run_with_gradients(fused, inputs).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-4, atol=2e-4, msg=name)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(act, dtype):
    inputs = make_inputs("layernorm_mlp", SMALL, 2, dtype)
    inputs["fc1_bias"] = (inputs["fc1_bias"].detach() * 40).requires_grad_()  # reaches both tails
    check("layernorm_mlp", inputs, act=act)


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "fc1_bias", "fc2_bias", "layer_scale", "all"])
def test_layernorm_mlp_optionals(missing):
    inputs = make_inputs("layernorm_mlp", SMALL, 2, torch.float32)
    optional = ["norm_weight", "norm_bias", "fc1_bias", "fc2_bias", "layer_scale"]
    for name in optional if missing == "all" else [missing]:
        inputs[name] = None
    check("layernorm_mlp", inputs)


@pytest.mark.parametrize("missing", [["bias"], ["layer_scale"], ["bias", "layer_scale"]])
def test_linear_residual_optionals(missing):
    inputs = make_inputs("linear_residual", SMALL, 2, torch.float32)
    check("linear_residual", inputs | dict.fromkeys(missing))


@pytest.mark.parametrize("missing", [["bias"], ["norm_bias"], ["norm_weight", "norm_bias", "bias"]])
def test_layernorm_linear_optionals(missing):
    inputs = make_inputs("layernorm_linear", SMALL, 2, torch.float32)
    check("layernorm_linear", inputs | dict.fromkeys(missing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear_residual", "layernorm_mlp"])
def test_row_scale_with_dropped_samples(op, dtype):
    row_scale = torch.tensor([0.0, 1 / 0.75, 1.0, 0.0], dtype=dtype)
    check(op, make_inputs(op, SMALL, 4, dtype), row_scale=row_scale)


def test_without_residual():
    check("layernorm_mlp", make_inputs("layernorm_mlp", SMALL, 2, torch.float32), residual=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_sliced_inputs(op, dtype):
    inputs = make_inputs(op, SMALL, 2, dtype)
    check(op, {name: sliced(value) for name, value in inputs.items()})


@pytest.mark.parametrize("op", OPS)
def test_misaligned_and_transposed_weights(op):
    inputs = make_inputs(op, ODD, 2, torch.bfloat16)
    for name, value in inputs.items():
        if value.dim() == 2:
            value = value.detach().t().contiguous().t().requires_grad_()
        else:
            value = torch.cat([value.detach().flatten()[:1], value.detach().flatten()])[1:].view_as(value)
            value.requires_grad_()
        inputs[name] = value
    check(op, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["layernorm_linear", "layernorm_mlp"])
def test_outlier_channel(op, dtype):
    inputs = make_inputs(op, SMALL, 2, dtype)
    with torch.no_grad():
        inputs["x"][..., 7] *= 100
    check(op, inputs)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["layernorm_linear", "layernorm_mlp"])
def test_float32_stream_with_half_weights(op, weights):
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    for name in inputs:
        if "fc" in name or name in ("weight", "bias", "layer_scale"):
            inputs[name] = inputs[name].detach().to(weights).requires_grad_()
    exact = run_with_gradients(getattr(reference, op), cast_inputs(inputs, torch.float64))
    ours = run_with_gradients(getattr(cpp_ops, op), inputs)
    assert ours["output"].dtype == (torch.float32 if op == "layernorm_mlp" else weights)
    for name, value in ours.items():
        if name != "output":
            assert value.dtype == inputs[name.removeprefix("grad_")].dtype
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        assert error <= torch.finfo(weights).eps, name


@pytest.mark.parametrize("op", OPS)
def test_gradients_do_not_depend_on_threads(op):
    def gradients(threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = make_inputs(op, Shape(96, 1, 384, 131), 3, torch.float32)
            out = getattr(cpp_ops, op)(**inputs)
            return [out.detach(), *torch.autograd.grad(out.square().sum(), list(inputs.values()))]
        finally:
            torch.set_num_threads(before)

    for one, two in zip(gradients(1), gradients(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("op", OPS)
def test_only_wanted_gradients_are_computed(op):
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    out = getattr(cpp_ops, op)(**inputs)
    grad = torch.randn_like(out)
    names = list(inputs)
    together = torch.autograd.grad(out, list(inputs.values()), grad)
    for name, expected in zip(names, together, strict=True):
        alone = {other: value.detach().requires_grad_(other == name) for other, value in inputs.items()}
        (got,) = torch.autograd.grad(getattr(cpp_ops, op)(**alone), [alone[name]], grad)
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op):
    inputs = make_inputs(op, SMALL, 1, torch.float32)
    for name in ("x", "residual"):
        if name in inputs:
            inputs[name] = inputs[name].detach()[:0].requires_grad_()
    out = getattr(cpp_ops, op)(**inputs)
    assert out.shape == (0, SMALL.tokens, out.shape[-1])
    for value, grad in zip(inputs.values(), torch.autograd.grad(out.sum(), list(inputs.values())), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_stay_in_their_row(op, dtype, bad):
    inputs = {name: value.detach() for name, value in make_inputs(op, ODD, 2, dtype).items()}
    clean = getattr(cpp_ops, op)(**inputs)
    inputs["x"][1, 3, 0] = bad
    out = getattr(cpp_ops, op)(**inputs)
    touched = torch.zeros(2, ODD.tokens, dtype=torch.bool)
    touched[1, 3] = True
    assert not out[touched].isfinite().any()
    assert torch.equal(out[~touched], clean[~touched])
