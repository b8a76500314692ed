"""torch.func and forward-mode differentiation: no kernel has a rule for them, so stock PyTorch runs."""

import pytest
import torch
from tiny_vits import images, native, one_thread
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import ops
from fastvit.dispatch import Unsupported, use_backend
from fastvit.testing import Shape, make_inputs

SMALL = Shape(embed_dim=64, num_heads=2, hidden_dim=96, tokens=5)
PLAIN = ("attention", "attention_packed", "layernorm_linear", "layernorm_mlp", "linear_residual", "patch_embed")


@pytest.fixture(autouse=True)
def _math_attention():
    """The only one that stock PyTorch differentiates forwards on a CPU."""
    with one_thread(), sdpa_kernel(SDPBackend.MATH):
        yield


def of_first(op):
    """The op as a function of its first tensor, and that tensor."""
    made = make_inputs(op, SMALL, 2, torch.float32)
    inputs = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in made.items()}
    name = next(iter(inputs))
    return lambda x: getattr(ops, op)(**inputs | {name: x}), inputs[name]


def with_dual(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.flip(0)))).tangent


TRANSFORMS = {
    "jvp": lambda call, x: jvp(call, (x,), (x.flip(0),))[1],
    "dual numbers": with_dual,
    "grad": lambda call, x: grad(lambda x: call(x).square().sum())(x),
    "vmap of grad": lambda call, x: vmap(grad(lambda x: call(x).square().sum()))(torch.stack((x, x.flip(0)))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", PLAIN)
def test_an_op_is_transformed_like_stock(op, transform):
    call, x = of_first(op)
    with use_backend("torch"):
        expected = TRANSFORMS[transform](call, x)
    call(x), call(x)  # a choice that was settled before is none for the transformed call
    found = TRANSFORMS[transform](call, x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_a_forced_kernel_refuses():
    pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
    call, x = of_first("layernorm_mlp")
    with use_backend("cpp"):
        call(x)
        with pytest.raises(Unsupported, match="forward-mode differentiation"):
            jvp(call, (x,), (x,))


def test_a_tangent_is_not_dropped_in_the_backward():
    pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
    call, x = of_first("layernorm_mlp")
    out = call(x.requires_grad_())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward derivative"):
        torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def of_model(transform, model, x):
    parameters = dict(model.named_parameters())

    def loss(parameters, images):
        return functional_call(model, parameters, (images,)).square().sum()

    if transform == "jvp":
        return {"tangent": jvp(model, (x,), (x.flip(0),))[1]}
    if transform == "grad":
        return grad(loss)(parameters, x)
    return vmap(grad(loss), (None, 0))(parameters, x[:, None])


@pytest.mark.parametrize("transform", ["jvp", "grad", "gradients for each sample"])
def test_our_own_model(transform):
    model, x = native(init_values=0.5), images()
    with use_backend("torch"):
        expected = of_model(transform, model, x)
    model(x), model(x)
    for name, value in of_model(transform, model, x).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(value / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)
