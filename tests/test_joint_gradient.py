"""``layernorm_linear(..., with_input=True)``: the op and its input, whose two gradients meet in one backward."""

import pytest
import torch

from fastvit import _extension, ops, reference, testing
from fastvit.dispatch import use_backend

SMALL = testing.Shape(embed_dim=64, num_heads=2, hidden_dim=96, tokens=5)
needs_cpp = pytest.mark.skipif(_extension.CPP is None, reason="; ".join(_extension.WHY_NOT_CPP))
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(_extension.why_not_cuda()), reason="no GPU or no CUDA library"
)
BACKENDS = ["torch", pytest.param("cpp", marks=needs_cpp), pytest.param("cuda", marks=needs_cuda)]


def inputs_for(backend, dtype=torch.float32):
    return testing.make_inputs("layernorm_linear", SMALL, 3, dtype, "cuda" if backend == "cuda" else "cpu")


def branch(**given):
    """A block's shape: the branch ends in the residual it left."""
    out, x = ops.layernorm_linear(**given, with_input=True)
    return 3 * x + out[..., :64].to(x.dtype)


def meaning(**given):
    return 3 * given["x"] + reference.layernorm_linear(**given)[..., :64].to(given["x"].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, dtype):
    given = inputs_for(backend, dtype)
    exact = testing.run_with_gradients(meaning, testing.cast_inputs(given, torch.float64))
    eager = testing.run_with_gradients(meaning, given)
    with use_backend(backend):
        ours = testing.run_with_gradients(branch, given)
    for name, value in ours.items():
        testing.assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_residual_under_autocast(backend):
    given = inputs_for(backend)
    exact = testing.run_with_gradients(meaning, testing.cast_inputs(given, torch.float64))
    with torch.autocast(given["x"].device.type, torch.bfloat16):
        eager = testing.run_with_gradients(meaning, given)
        with use_backend(backend):
            ours = testing.run_with_gradients(branch, given)
    assert ours["grad_x"].dtype == torch.float32
    for name, value in ours.items():
        testing.assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["x", "norm_weight", "weight", "bias"])
def test_only_the_wanted_gradients(backend, frozen):
    given = inputs_for(backend)
    with use_backend(backend):
        everything = testing.run_with_gradients(branch, given)
        given[frozen] = given[frozen].detach()
        ours = testing.run_with_gradients(branch, given)
    assert f"grad_{frozen}" not in ours
    for name, value in ours.items():
        torch.testing.assert_close(value, everything[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_the_two_results_unused(backend):
    given = inputs_for(backend)
    x, weight = given["x"], given["weight"]
    with use_backend(backend):
        out, same = ops.layernorm_linear(**given, with_input=True)
        assert torch.equal(same, x)
        (alone,) = torch.autograd.grad(same.sum(), x, retain_graph=True)
        assert torch.equal(alone, torch.ones_like(x))
        plain = torch.autograd.grad(ops.layernorm_linear(**given).square().sum(), (x, weight))
        for got, wanted in zip(torch.autograd.grad(out.square().sum(), (x, weight)), plain, strict=True):
            torch.testing.assert_close(got, wanted)
        with torch.no_grad():
            assert ops.layernorm_linear(**given, with_input=True)[1] is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative(backend):
    given = inputs_for(backend)

    def second(fn, given):
        leaves = [value for value in given.values() if value.requires_grad]
        grads = torch.autograd.grad(fn(**given).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    exact = second(meaning, testing.cast_inputs(given, torch.float64))
    eager = second(meaning, given)
    with use_backend(backend):
        ours = second(branch, given)
    for got, stock, wanted in zip(ours, eager, exact, strict=True):
        testing.assert_as_accurate(got, stock, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_its_backward(backend):
    torch.compiler.reset()
    given = inputs_for(backend)
    with use_backend(backend):
        expected = testing.run_with_gradients(branch, given)
        ours = testing.run_with_gradients(torch.compile(branch, fullgraph=True, backend="aot_eager"), given)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_checkpointing(backend):
    given = inputs_for(backend)

    def checkpointed(**given):
        return torch.utils.checkpoint.checkpoint(lambda x: branch(**{**given, "x": x}), given["x"], use_reentrant=False)

    with use_backend(backend):
        expected = testing.run_with_gradients(branch, given)
        ours = testing.run_with_gradients(checkpointed, given)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
