"""Inputs that are right but unkind: at odd addresses, on strides beyond 2^31, denormal; a weight on another device."""

import cpp_ops  # noqa: F401 - skips where the extension is not built
import pytest
import torch
from torch import Tensor

from fastvit import ops
from fastvit.dispatch import use_backend
from fastvit.testing import Shape, assert_op_as_accurate, make_inputs, run_with_gradients

SHAPE = Shape(embed_dim=48, num_heads=2, hidden_dim=96, tokens=19, patch_size=8, image_size=24)
OPS = (
    *("patch_embed", "layernorm_linear", "attention", "attention_packed", "attention_varlen"),
    *("linear_residual", "layernorm_mlp"),
)
FAR = 2**31 + 64  # elements


def run(op: str):
    def call(**inputs) -> Tensor:
        with use_backend("cpp"):
            return getattr(ops, op)(**inputs)

    return call


def off_by_one(value: Tensor) -> Tensor:
    """The same values one element further in memory: aligned to the element and to nothing more."""
    shifted = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value.detach())
    assert shifted.data_ptr() % 16 == value.element_size()
    return shifted.requires_grad_(value.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_misaligned(op, dtype):
    inputs = make_inputs(op, SHAPE, 2, dtype)
    assert_op_as_accurate(op, run(op), {n: off_by_one(v) if isinstance(v, Tensor) else v for n, v in inputs.items()})


def test_misaligned_bytes():
    inputs = make_inputs("patch_embed", SHAPE, 2, torch.float32)
    pixels = torch.randint(0, 256, inputs["images"].shape, dtype=torch.uint8)
    shifted = torch.empty(pixels.numel() + 1, dtype=torch.uint8)[1:].view(pixels.shape).copy_(pixels)
    call = run("patch_embed")
    assert torch.equal(call(**inputs | {"images": shifted}), call(**inputs | {"images": pixels}))


def far_apart(value: Tensor) -> Tensor:
    """The first two, the second more than 2^31 elements behind the first; pages between them are never touched."""
    value = value.detach()[:2]
    inner = value[0].numel()
    memory = torch.empty(FAR + inner, dtype=value.dtype)
    return memory.as_strided(value.shape, (FAR, *value[0].contiguous().stride())).copy_(value)


FAR_INPUTS = {
    "patch_embed": "images",
    "layernorm_linear": "x",
    "attention": "k",
    "attention_packed": "qkv",
    "linear_residual": "residual",
    "layernorm_mlp": "x",
}


@pytest.mark.parametrize("op", FAR_INPUTS)
def test_huge_strides(op):
    name = FAR_INPUTS[op]
    inputs = make_inputs(op, SHAPE, 2, torch.bfloat16)
    expected = run_with_gradients(run(op), inputs)
    got = run_with_gradients(run(op), inputs | {name: far_apart(inputs[name]).requires_grad_()})
    for result, value in expected.items():
        assert torch.equal(got[result], value), result


def test_weight_rows_far_apart():
    inputs = make_inputs("layernorm_linear", SHAPE, 2, torch.bfloat16)
    near = {n: inputs[n].detach()[:2].requires_grad_() for n in ("weight", "bias")}
    expected = run_with_gradients(run("layernorm_linear"), inputs | near)
    far = {"weight": far_apart(near["weight"]).requires_grad_()}
    got = run_with_gradients(run("layernorm_linear"), inputs | near | far)
    for result, value in expected.items():
        assert torch.equal(got[result], value), result
    with torch.no_grad():  # its pack is kept: the fingerprint reads over the gap too
        assert torch.equal(run("layernorm_linear")(**inputs | near | far), expected["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["patch_embed", "layernorm_linear", "linear_residual", "layernorm_mlp"])
def test_denormals(op, dtype):
    inputs = make_inputs(op, SHAPE, 2, dtype)
    first = next(iter(inputs))
    inputs[first] = (inputs[first].detach() * 1e-39).requires_grad_()
    assert_op_as_accurate(op, run(op), inputs)


@pytest.mark.parametrize("op", ["patch_embed", "layernorm_linear", "linear_residual", "layernorm_mlp"])
def test_weight_elsewhere(op):
    inputs = make_inputs(op, SHAPE, 2, torch.float32)
    name = "fc1_weight" if op == "layernorm_mlp" else "weight"
    with pytest.raises(ValueError, match=rf"{op}: .* is on (meta|cpu), expected (meta|cpu)"):
        run(op)(**inputs | {name: inputs[name].detach().to("meta")})
