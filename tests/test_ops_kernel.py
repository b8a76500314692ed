"""The Triton ops through their public functions: autograd, compile, refusals. Needs CUDA or the interpreter."""

import pytest
import torch

from fastvit import _extension, ops, reference
from fastvit.dispatch import Unsupported, recording, use_backend
from fastvit.testing import (
    Shape,
    assert_as_accurate,
    assert_op_as_accurate,
    cast_inputs,
    make_inputs,
    run_with_gradients,
    sliced,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Shape(embed_dim=64, num_heads=2, hidden_dim=96, tokens=5, patch_size=8, image_size=16)
TRITON = ("patch_embed", "attention", "attention_packed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(
    bool(_extension.WHY_NOT_TRITON) or not (torch.cuda.is_available() or _extension.TRITON_INTERPRETED),
    reason="needs triton, and CUDA or TRITON_INTERPRET=1",
)


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def inputs_of(op, batch=2, dtype=torch.float32, shape=SMALL):
    return make_inputs(op, shape, batch, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", TRITON)
def test_parity(op, dtype):
    assert_op_as_accurate(op, getattr(ops, op), inputs_of(op, 3, dtype))


@pytest.mark.parametrize("op", TRITON)
def test_parity_at_vit_length(op):
    shape = Shape(embed_dim=64, num_heads=1, hidden_dim=96, tokens=197, patch_size=16, image_size=224)
    assert_op_as_accurate(op, getattr(ops, op), inputs_of(op, 1, torch.float32, shape))


@pytest.mark.parametrize("op", TRITON)
def test_sliced_inputs(op):
    inputs = {name: sliced(v) if isinstance(v, torch.Tensor) else v for name, v in inputs_of(op).items()}
    assert_op_as_accurate(op, getattr(ops, op), inputs)


@pytest.mark.parametrize("op", TRITON)
def test_empty_batch(op):
    inputs = inputs_of(op, 0)
    results = run_with_gradients(getattr(ops, op), inputs)
    expected = run_with_gradients(getattr(reference, op), inputs)
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("op", TRITON)
def test_only_the_wanted_gradients(op):
    inputs = inputs_of(op)
    full = run_with_gradients(getattr(ops, op), inputs)
    for frozen in [name for name, v in inputs.items() if isinstance(v, torch.Tensor)][:-1]:
        some = run_with_gradients(getattr(ops, op), inputs | {frozen: inputs[frozen].detach()})
        assert all(torch.equal(value, full[name]) for name, value in some.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", TRITON)
def test_nan_and_infinity_propagate(op, value):
    inputs = inputs_of(op)
    first = next(iter(inputs))
    with torch.no_grad():
        inputs[first][(0,) * inputs[first].dim()] = value
        ours, expected = getattr(ops, op)(**inputs), getattr(reference, op)(**inputs)
    assert torch.equal(ours.isfinite(), expected.isfinite())


@pytest.mark.parametrize("op", TRITON)
def test_an_image_does_not_depend_on_its_batch(op):
    inputs = inputs_of(op, 3)
    batched = ("images", "q", "k", "v", "qkv")
    alone = {name: v[1:2] if name in batched else v for name, v in inputs.items()}
    ours, alone = getattr(ops, op)(**inputs)[1:2], getattr(ops, op)(**alone)
    # The interpreter multiplies with NumPy, whose sums depend on a row's place in the tile.
    torch.testing.assert_close(ours, alone, rtol=0, atol=0 if DEVICE == "cuda" else 1e-6)


@pytest.mark.parametrize("op", TRITON)
def test_opcheck(op):
    inputs = inputs_of(op)
    overload = getattr(torch.ops.fastvit, f"{op}_fwd").default
    rest = {
        "patch_embed": (None, None, False),  # mean, std, cache
        "attention": (None, False, 0.125),  # attn_mask, is_causal, scale
        "attention_packed": (0.125,),
    }
    arguments = [*inputs.values()]
    if op == "patch_embed":
        arguments = [inputs[name] for name in ("images", "weight", "bias", "pos_embed", "prefix")]
    torch.library.opcheck(overload, (*arguments, *rest[op], "triton"))


@pytest.mark.parametrize("op", TRITON)
def test_compiles_whole_with_its_backward(op):
    torch.compiler.reset()
    inputs = inputs_of(op)
    expected = run_with_gradients(getattr(ops, op), inputs)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    for name, value in run_with_gradients(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("op", TRITON)
def test_double_backward_is_the_reference(op):
    def second(fn, inputs):
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
        output = fn(**inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
        grads = torch.autograd.grad((output * output * weights).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    draws = []
    for seed in range(8):  # of one draw the ratio of the errors is luck, from 0.4 to 2.9
        torch.manual_seed(seed)
        inputs = inputs_of(op)
        inputs |= {k: torch.randn_like(v).requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        exact = second(getattr(reference, op), cast_inputs(inputs, torch.float64))
        draws.append((second(getattr(ops, op), inputs), second(getattr(reference, op), inputs), exact))
    for ours, stock, exact in zip(*(zip(*runs, strict=True) for runs in zip(*draws, strict=True)), strict=True):
        assert_as_accurate(torch.stack(ours), torch.stack(stock), torch.stack(exact))


@pytest.mark.parametrize("tables", ["pos_embed", "prefix", "both", "patches alone", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_patch_embed_under_autocast_in_one_pass(tables, dtype):
    """float32 tables are added in the kernel, to sums that were not rounded: stock's dtypes, gradients of each."""
    inputs = inputs_of("patch_embed")
    if tables in ("prefix", "none"):
        del inputs["pos_embed"]
    if tables in ("pos_embed", "patches alone", "none"):
        del inputs["prefix"]
        if "pos_embed" in inputs:
            inputs["pos_embed"] = inputs["pos_embed"].detach()[1:].requires_grad_()
    if tables == "patches alone":
        inputs["prefix"] = inputs_of("patch_embed")["prefix"]
    dout = torch.randn(run_with_gradients(reference.patch_embed, inputs)["output"].shape, device=DEVICE)
    exact = run_with_gradients(reference.patch_embed, cast_inputs(inputs, torch.float64), dout)
    with torch.autocast(DEVICE, dtype):
        stock = run_with_gradients(reference.patch_embed, inputs, dout)
        with recording() as calls:
            ours = run_with_gradients(ops.patch_embed, inputs, dout)
    assert calls == [("patch_embed", "triton")]
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype, name
        assert_as_accurate(value, stock[name], exact[name], name)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_out_of_reach_are_refused(scale):
    with pytest.raises(Unsupported, match=f"scale is {scale}, triton takes one above 0"):
        ops.attention(**inputs_of("attention"), scale=scale)


@pytest.mark.parametrize("head_dim", [24, 36, 136])
def test_head_dims_out_of_reach_are_refused(head_dim):
    with pytest.raises(Unsupported, match=f"the head dim is {head_dim}, triton takes 32 to 128 in steps of 8"):
        ops.attention_packed(torch.zeros(1, 3, 3 * head_dim, device=DEVICE), 1)


def test_float64_is_refused():
    with pytest.raises(Unsupported, match=r"q is torch.float64, the kernels take float32, bfloat16 and float16"):
        ops.attention(**cast_inputs(inputs_of("attention"), torch.float64))
