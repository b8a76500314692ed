"""fastvit/ops/_cuda.py without a GPU: the passes of csrc/cuda replaced by the same formulas in plain PyTorch.

What is proved here is the composition: which products are taken of what, what is recomputed, where a scale goes, and
every gradient. The passes themselves are proved in test_cuda_layernorm.py and test_cuda_kernels.py.
"""

from types import SimpleNamespace

import pytest
import torch
from cuda_passes import JOINED, PASSES, PRODUCTS, gate, wide

from fastvit import reference, testing
from fastvit.ops import _cuda, _sm90


@pytest.fixture(autouse=True, params=["cublas", "hopper", "joined"])
def passes(request, monkeypatch):
    """The passes in PyTorch, alone, beside Hopper's products, and beside those that are joined with LayerNorm."""
    functions = {"cublas": PASSES, "hopper": PASSES + PRODUCTS, "joined": PASSES + PRODUCTS + JOINED}[request.param]
    monkeypatch.setattr(_cuda, "ops", SimpleNamespace(**{fn.__name__: fn for fn in functions}))
    monkeypatch.setattr(_sm90, "device_facts", lambda index: ((9, 0), 132))
    # PyTorch takes out_dtype on a GPU only
    monkeypatch.setattr(_cuda, "_float32_product", lambda a, b: wide(a) @ wide(b))


def chained_product(a, b):
    """``a @ b`` with the terms of an element added one after another: the longest sums a product may have."""
    out = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        out.addr_(a[:, k], b[k])
    return out


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

        def layernorm_linear(x, norm_weight, norm_bias, weight, bias):  # by name: PyTorch 2.11's apply takes no names
            return LayerNormLinear.apply(x, norm_weight, norm_bias, weight, bias)

        return layernorm_linear

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


def autocast_inputs(op, dtype):
    given = build(op, "all", torch.float32)
    narrow = {"weight", "bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"}
    narrow |= {"x"} if op == "linear_residual" else set()
    return {k: v.detach().to(dtype).requires_grad_() if k in narrow else v for k, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_residual_stream(op, dtype):
    """Under autocast x or residual, norm and scales stay float32 and the weights do not."""
    given = autocast_inputs(op, dtype)
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
    """The model's gate and slope are the activations and their derivatives (the kernels': test_cuda_activation.py)."""
    h = torch.linspace(-12, 12, 20001, dtype=torch.float64).requires_grad_()
    for act in reference.ACTIVATIONS:
        value, slope = gate(h, act)
        exact = reference.activation(h, act)
        (derivative,) = torch.autograd.grad(exact.sum(), h)
        torch.testing.assert_close(h * value, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(value + h * slope, derivative, rtol=1e-9, atol=1e-12)


def test_products_take_what_they_can(passes, monkeypatch):
    """Each product goes to Hopper's kernels where its operands fit, and the others to cuBLAS."""
    called = []
    for fn in PRODUCTS + JOINED:
        if hasattr(_cuda.ops, fn.__name__):
            monkeypatch.setattr(_cuda.ops, fn.__name__, lambda *given, fn=fn: called.append(fn.__name__) or fn(*given))
    prove("layernorm_mlp", build("layernorm_mlp", "all", torch.bfloat16))
    expected = {fn.__name__ for fn in PRODUCTS} if hasattr(_cuda.ops, "linear_act") else set()
    if hasattr(_cuda.ops, "layernorm_mlp_residual"):
        expected = {"layernorm_mlp_residual", "linear_act_grad"}
    assert set(called) == expected
    called.clear()
    prove("layernorm_mlp", build("layernorm_mlp", "all", torch.float32))
    assert called == []


@pytest.mark.parametrize("op", ["linear_residual", "layernorm_mlp"])
def test_products_add_to_a_float32_residual(op, monkeypatch):
    """Under autocast no pass over memory adds the residual: the product does."""
    if not hasattr(_cuda.ops, "linear_act"):
        return
    given = autocast_inputs(op, torch.bfloat16)
    monkeypatch.delattr(_cuda.ops, "scale_residual_fwd")
    with torch.no_grad():
        assert fused(op)(**given).dtype == torch.float32


def test_reasons_against_the_products(passes, monkeypatch):
    x, weight = torch.randn(8, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    if not hasattr(_cuda.ops, "linear_act"):
        assert "not in the CUDA library" in _sm90.why_not(_cuda.ops, 16, x=x, weight=weight)[0]
        return
    assert _sm90.why_not(_cuda.ops, 16, x=x, weight=weight) == []
    cases = [
        ("x is torch.float32, Hopper's products take bfloat16 and float16", 16, x.float(), weight.float()),
        ("weight is torch.float16, x is torch.bfloat16", 16, x, weight.half()),
        ("the product has 15 columns, Hopper's products take multiples of 8", 15, x, weight[:15]),
        ("x has 63 columns, Hopper's products take multiples of 8", 16, x[:, :63], weight),
        ("x's rows do not start at multiples of 16 bytes", 16, x[:, 4:60], weight[:, :56]),
        ("weight's rows do not start at multiples of 16 bytes", 16, x, torch.randn(64, 16).bfloat16().t()),
        ("x's rows overlap, Hopper's products take a stride of 64 or more", 16, x[:1].expand(8, 64), weight),
        ("x has 0 columns, Hopper's products take multiples of 8", 16, x[:, :0], weight[:, :0]),
    ]
    odd_stride = torch.randn(67).bfloat16().as_strided((1, 64), (67, 1))
    assert _sm90.why_not(_cuda.ops, 16, x=odd_stride, weight=weight) == []  # a single row has no next one
    for reason, cols, left, right in cases:
        assert any(reason in found for found in _sm90.why_not(_cuda.ops, cols, x=left, weight=right)), reason
    wide, half = torch.randn(8, 16), torch.randn(8, 16).half()
    assert _sm90.why_not(_cuda.ops, 16, wide, x=x, weight=weight) == []
    residual_cases = [
        ("residual is torch.float16, Hopper's products add to torch.bfloat16 or float32", half),
        ("residual's rows do not start at multiples of 16 bytes", torch.randn(8, 18)[:, :16]),
        ("residual's rows do not start at multiples of 16 bytes", torch.randn(8, 20)[:, 1:17]),
    ]
    for reason, residual in residual_cases:
        assert any(reason in found for found in _sm90.why_not(_cuda.ops, 16, residual, x=x, weight=weight)), reason
    assert _sm90.why_not(_cuda.ops, 16, torch.randn(8, 20)[:, :16], x=x, weight=weight) == []
    monkeypatch.setattr(_sm90, "device_facts", lambda index: ((8, 0), 108))
    assert "compute capability 8.0" in _sm90.why_not(_cuda.ops, 16, x=x, weight=weight)[0]
