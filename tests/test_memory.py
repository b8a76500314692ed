"""What an MLP step keeps for its backward, counted in bytes: tensors autograd saves that are not parameters."""

import pytest
import torch

import fastvit
from fastvit import reference, testing

SHAPE, BATCH = testing.VIT_SHAPES["tiny"], 3


def kept_bytes(op, given, **options):
    """Storages that the graph keeps alive, each once, without parameters and without the op's own input."""
    parameters = {t.untyped_storage().data_ptr() for k, t in given.items() if isinstance(t, torch.Tensor) and k != "x"}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = op(**given, **options)
    del out
    return sum(kept.values())


def stock(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale=None):
    import torch.nn.functional as F

    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), fc1_weight, fc1_bias))
    branch = F.linear(hidden, fc2_weight, fc2_bias)
    return x + (branch if layer_scale is None else branch * layer_scale)


BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(bool(fastvit._extension.why_not_cpp()), reason="no C++ extension")),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or bool(fastvit._extension.why_not_cuda()), reason="no GPU or no CUDA library"
        ),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept_for_the_backward(backend, dtype):
    """In units of x, eager keeps x, LN's result, fc1's, the activation's (1 + 1 + 4 + 4); ours x and fc1's; lean x."""
    given = testing.make_inputs("layernorm_mlp", SHAPE, BATCH, dtype, "cuda" if backend == "cuda" else "cpu")
    given["layer_scale"] = None
    eager = kept_bytes(stock, given)
    with fastvit.use_backend(backend):
        ours = kept_bytes(fastvit.ops.layernorm_mlp, given)
        lean = kept_bytes(fastvit.ops.layernorm_mlp, given, memory="lean")
    assert ours <= 0.65 * eager
    assert lean <= 0.42 * eager
    assert lean <= 1.1 * given["x"].nbytes


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lean_gradients(backend, dtype):
    given = testing.make_inputs("layernorm_mlp", SHAPE, BATCH, dtype, "cuda" if backend == "cuda" else "cpu")

    def lean(**given):
        return fastvit.ops.layernorm_mlp(**given, memory="lean")

    with fastvit.use_backend(backend):
        ours = testing.run_with_gradients(lean, given)
        full = testing.run_with_gradients(fastvit.ops.layernorm_mlp, given)
    assert torch.equal(ours["out"], full["out"]) if "out" in ours else True
    exact = testing.run_with_gradients(reference.layernorm_mlp, testing.cast_inputs(given, torch.float64))
    eager = testing.run_with_gradients(reference.layernorm_mlp, given)
    for name, value in ours.items():
        testing.assert_as_accurate(value, eager[name], exact[name], name)


def test_lean_models():
    """The option reaches every block, keeps the gradients, and restore takes it off."""
    torch.manual_seed(0)
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    images = torch.randn(2, 3, 32, 32)

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    fastvit.accelerate(model, memory="lean")
    assert [b.forward.options["options"] for b in model.blocks] == [{"memory": "lean"}] * 3
    for got, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    fastvit.restore(model)
    assert "forward" not in model.blocks[0].__dict__


def test_memory_is_one_of_two():
    given = testing.make_inputs("layernorm_mlp", SHAPE, 1, torch.float32)
    with pytest.raises(ValueError, match="layernorm_mlp: memory is 'none', expected one of 'default', 'lean'"):
        fastvit.ops.layernorm_mlp(**given, memory="none")
