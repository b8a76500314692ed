"""fastvit/ops/_cuda.py without a GPU: the passes of csrc/cuda replaced by the same formulas in plain PyTorch.

What is proved here is the composition: which products are taken of what, what is recomputed, where a scale goes, and
every gradient. The passes themselves are proved in test_cuda_kernels.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cuda_passes import PASSES, gate, wide

from fastvit import reference, testing
from fastvit.ops import _cuda


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    monkeypatch.setattr(_cuda, "ops", SimpleNamespace(**{fn.__name__: fn for fn in PASSES}))
    # PyTorch takes out_dtype on a GPU only
    monkeypatch.setattr(_cuda, "_float32_product", lambda a, b: wide(a) @ wide(b))


class LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias):
        out, mean, rstd = _cuda.layernorm_linear_fwd(x, norm_weight, norm_bias, weight, bias, 1e-6, False)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        return out

    @staticmethod
    def backward(ctx, dout):
        mask = list(ctx.needs_input_grad)
        grads = _cuda.layernorm_linear_bwd(dout, *ctx.saved_tensors, mask)
        return keep(mask, grads)


class LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, layer_scale, row_scale):
        ctx.save_for_backward(x, weight, bias, layer_scale, row_scale)
        return _cuda.linear_residual_fwd(x, weight, bias, residual, layer_scale, row_scale, False)

    @staticmethod
    def backward(ctx, dout):
        mask = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
        grads = keep(mask, _cuda.linear_residual_bwd(dout, *ctx.saved_tensors, mask))
        return *grads[:3], dout, grads[3], None


class LayerNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, residual):
        ctx.act, ctx.residual = act, residual
        out, mean, rstd, h = _cuda.layernorm_mlp_fwd(
            x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, 1e-6, residual, True, False
        )
        unsaved = _cuda.layernorm_mlp_fwd(
            x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, act, 1e-6, residual, False, False
        )
        assert torch.equal(unsaved[0], out)
        assert unsaved[3].numel() == 0
        ctx.save_for_backward(x, mean, rstd, h, nw, nb, w1, w2, b2, layer_scale, row_scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        mask = list(ctx.needs_input_grad[:8])
        grads = _cuda.layernorm_mlp_bwd(dout, *ctx.saved_tensors, ctx.act, ctx.residual, mask)
        return *keep(mask, grads), None, None, None


def keep(mask, grads):
    for wanted, grad in zip(mask, grads, strict=True):
        assert wanted or grad.numel() == 0
    return tuple(grad if wanted else None for wanted, grad in zip(mask, grads, strict=True))


def fused(op):
    """The op as fastvit.reference has it, on the composition."""
    if op == "layernorm_linear":
        return LayerNormLinear.apply

    if op == "linear_residual":

        def linear_residual(x, weight, bias, residual, layer_scale=None, row_scale=None):
            return LinearResidual.apply(x, weight, bias, residual, layer_scale, row_scale)

        return linear_residual

    def layernorm_mlp(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale=None,
        row_scale=None,
        act="gelu",
        residual=True,
    ):
        weights = norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
        return LayerNormMlp.apply(x, *weights, layer_scale, row_scale, act, residual)

    return layernorm_mlp


SMALL = testing.Shape(48, 3, 96, 17)
OPS = ("layernorm_linear", "linear_residual", "layernorm_mlp")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# what may be left out, and what may be added; each case of its own
VARIANTS = {
    "all": lambda given: given,
    "no scale": lambda given: {**given, "layer_scale": None},
    "no bias": lambda given: {k: None if k.endswith("bias") else v for k, v in given.items()},
    "no bias, no scale": lambda given: {
        k: None if k.endswith("bias") or k == "layer_scale" else v for k, v in given.items()
    },
    "no norm": lambda given: {k: None if k.startswith("norm_") else v for k, v in given.items()},
    "row scale": lambda given: {**given, "row_scale": torch.tensor([0.0, 1.25, 1.25])},
    "row scale, no layer scale": lambda given: {
        **given,
        "row_scale": torch.tensor([1.5, 0.0, 1.5]),
        "layer_scale": None,
    },
}


def variants(op):
    for name in VARIANTS:
        if not (op == "layernorm_linear" and "scale" in name) and not (op == "linear_residual" and name == "no norm"):
            yield op, name


def build(op, variant, dtype):
    given = testing.make_inputs(op, SMALL, 3, dtype)
    made = {k: v for k, v in VARIANTS[variant](given).items() if k in given or v is not None}
    if made.get("row_scale") is not None:
        made["row_scale"] = made["row_scale"].to(dtype)
    return made


def prove(op, given):
    """Through both gates; in float64 stock PyTorch is the exact result, so there the numbers must agree."""
    if given["x"].dtype != torch.float64:
        testing.assert_op_as_accurate(op, fused(op), given)
        return
    ours = testing.run_with_gradients(fused(op), given)
    exact = testing.run_with_gradients(getattr(reference, op), given)
    for name, value in ours.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "variant"), [case for op in OPS for case in variants(op)])
def test_every_gradient(op, variant, dtype):
    prove(op, build(op, variant, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_mlp_options(act, residual, dtype):
    given = {**build("layernorm_mlp", "row scale", dtype), "act": act, "residual": residual}
    prove("layernorm_mlp", given)


@pytest.mark.parametrize("op", OPS)
def test_sliced_inputs(op):
    given = build(op, "all", torch.float32)
    given = {k: testing.sliced(v) if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in given.items()}
    prove(op, given)


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradient(op):
    """``out.sum().backward()`` brings a gradient without strides."""
    given = build(op, "all", torch.float64)
    ours = [v for v in given.values() if v.requires_grad]
    wanted = torch.autograd.grad(getattr(reference, op)(**given).sum(), ours)
    for grad, expected in zip(torch.autograd.grad(fused(op)(**given).sum(), ours), wanted, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("op", OPS)
def test_masks_leave_the_other_gradients_alone(op):
    given = build(op, "all", torch.float64)
    names = [k for k, v in given.items() if k != "residual"]
    everything = testing.run_with_gradients(fused(op), given)
    for chosen in ([name] for name in names):
        some = {k: v.detach().requires_grad_(k in chosen) for k, v in given.items()}
        grads = testing.run_with_gradients(fused(op), some)
        for name in chosen:
            assert torch.equal(grads[f"grad_{name}"], everything[f"grad_{name}"]), name


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op):
    given = build(op, "all", torch.float32)
    given = {k: v[:0].detach().requires_grad_() if k in ("x", "residual") else v for k, v in given.items()}
    ours = testing.run_with_gradients(fused(op), given)
    exact = testing.run_with_gradients(getattr(reference, op), given)
    for name, value in ours.items():
        assert value.shape == exact[name].shape
        assert not value.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_residual_stream(op, dtype):
    """Under autocast x or residual, norm and scales stay float32 and the weights do not."""
    given = build(op, "all", torch.float32)
    narrow = {"weight", "bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"}
    narrow |= {"x"} if op == "linear_residual" else set()
    given = {k: v.detach().to(dtype).requires_grad_() if k in narrow else v for k, v in given.items()}
    ours = testing.run_with_gradients(fused(op), given)
    exact = testing.run_with_gradients(getattr(reference, op), testing.cast_inputs(given, torch.float64))
    for name, value in ours.items():
        assert value.dtype == (given[name[5:]].dtype if name.startswith("grad_") else value.dtype)
    with torch.autocast("cpu", dtype):
        eager = testing.run_with_gradients(getattr(reference, op), given)
    for name, value in ours.items():
        testing.assert_as_accurate(value, eager[name].to(value.dtype), exact[name], name)


def test_small_layer_scale_in_float16():
    """LayerScale starts at 1e-5 in DINOv2: nothing may fall below float16 on its way."""
    given = build("linear_residual", "all", torch.float16)
    given["layer_scale"] = torch.full_like(given["layer_scale"], 1e-5).requires_grad_()
    with torch.no_grad():
        shape = given["residual"].shape
    scaled = torch.full(shape, 1024.0)
    ours = testing.run_with_gradients(fused("linear_residual"), given, scaled)
    exact = testing.run_with_gradients(reference.linear_residual, testing.cast_inputs(given, torch.float64), scaled)
    for name in ("grad_x", "grad_weight", "grad_layer_scale"):
        error = (ours[name].double() - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        assert error < 4e-3, name


def test_gates_of_the_kernels():
    """activation.cu's gate and slope are the activations and their derivatives; its polynomial is erf to 1.5e-7."""
    h = torch.linspace(-12, 12, 20001, dtype=torch.float64).requires_grad_()
    for act in reference.ACTIVATIONS:
        value, slope = gate(h, act)
        exact = reference.activation(h, act)
        (derivative,) = torch.autograd.grad(exact.sum(), h)
        torch.testing.assert_close(h * value, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(value + h * slope, derivative, rtol=1e-9, atol=1e-12)
    t = 1 / (1 + 0.3275911 * 0.5**0.5 * h.abs())
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * poly * torch.exp(-0.5 * h * h)
    fast = torch.where(h > 0, 1 - tail, tail)
    assert (fast - 0.5 * torch.erfc(-h * 0.5**0.5)).abs().max() < 1e-7
    assert (h * fast - F.gelu(h)).abs().max() < 2.5e-7
