"""A block's training step on Hopper in two calls: the bits of the ops, and neither where anything is unusual."""

import cuda_on_cpu
import pytest
import torch
from block_plans import block, by_ops
from block_training import BF16, F16, F32, MORE, assert_same_step, counted, on_hopper, step, wanting
from test_host_path import WIDTH, tokens
from torch import nn

from fastvit import block_plan, layers
from fastvit.dispatch import use_backend


@pytest.fixture
def calls(monkeypatch):
    """For each backward that might be one call of Hopper's: whether it was."""
    with on_hopper():
        yield counted(monkeypatch, "backward")


@pytest.fixture
def forwards(monkeypatch, calls):
    """The same of forwards."""
    return counted(monkeypatch, "forward")


@pytest.mark.parametrize("stream", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("options", MORE)
def test_hoppers_step_in_two_calls(options, stream, calls, forwards):
    made, x = block(F16 if stream == F16 else BF16, **MORE[options]).train(), wanting(stream)
    for _ in range(2):
        assert_same_step(made, x)
    assert calls == forwards == [True]
    assert_same_step(made, x.flip(0).detach().requires_grad_())
    assert calls == forwards == [True, True]


def test_hoppers_backward_takes_the_launches_of_the_first_one(calls):
    made, x = block(BF16), wanting()
    made(x), made(x)  # no backward was run yet
    grads = [step(made, x) for _ in range(2)]
    assert calls == [False, True]
    assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in grads), strict=True))


@pytest.mark.parametrize("options", ["plain", "drop path", "layer scale", "both scales"])
def test_hoppers_step_under_autocast(options, calls, forwards):
    made, x = block(F32, **MORE[options]).train(), wanting(F32)
    with torch.autocast("cpu", dtype=BF16):
        for _ in range(3):
            assert_same_step(made, x)
    assert calls == forwards == [True, True]


@pytest.mark.parametrize("only", [None, "drop_path1", "drop_path2"])
@pytest.mark.parametrize("batch", [1, 7])
def test_each_sample_has_its_drop_path(batch, only, calls, forwards):
    made, x = block(BF16, drop_path=0.4).train(), torch.randn(batch, 5, WIDTH).to(BF16).requires_grad_()
    for name in {"drop_path1", "drop_path2"} - {only}:
        if only is not None:
            setattr(made, name, nn.Identity())
    found = [assert_same_step(made, x, seed)["x"] for seed in range(5)]
    assert len({gradient.float().sum().item() for gradient in found}) > 1
    assert calls == forwards == [True] * 4


WANTED = {  # by names that begin or end so
    "x": (),
    "qkv": ("attn.qkv",),
    "qkv's bias": ("attn.qkv.bias",),
    "norms": ("norm1", "norm2"),
    "one of a norm": ("norm1.bias", "norm2.weight"),
    "biases": (".bias",),
    "weights": (".weight",),
    "attention": ("norm1", "attn"),
    "projection": ("attn.proj",),
    "its bias": ("attn.proj.bias",),
    "MLP": ("norm2", "mlp"),
    "fc1's bias": ("mlp.fc1.bias",),
    "fc1's weight and fc2's bias": ("mlp.fc1.weight", "mlp.fc2.bias"),
    "fc2's weight": ("mlp.fc2.weight",),
    "layer scales": ("ls",),
    "all but those": ("norm", "attn", "mlp"),
    "all": ("",),
}


def freeze_but(made, wanted):
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(wanted) or name.endswith(wanted))


def wants_any(*modules):
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "stream"),
    [("drop path", BF16), ("drop path", F32), ("layer scale", F16), ("both scales", BF16), ("both scales", F32)],
    ids=str,
)
@pytest.mark.parametrize("x_wants", [True, False])
@pytest.mark.parametrize("wanted", WANTED)
def test_frozen_parameters_in_two_calls(wanted, x_wants, stream, options, calls, forwards):
    made, x = block(F16 if stream == F16 else BF16, **MORE[options]).train(), tokens(stream).requires_grad_(x_wants)
    freeze_but(made, WANTED[wanted])
    if not (x_wants or wants_any(made.norm1, made.attn, made.ls1)):
        return  # the ops, as nothing is kept of the attention
    for _ in range(2):
        assert_same_step(made, x)
    assert calls == forwards == [True]


@pytest.mark.parametrize("name", [name for name, _ in block(init_values=0.3).named_parameters()])
def test_one_gradient_alone_in_one_call(name, calls):
    """Asked for of a graph that has all of them."""
    made, x = block(BF16, init_values=0.3), wanting()
    for _ in range(2):
        step(made, x)
    del calls[:]

    def run(given):
        return torch.autograd.grad(made(given).float().square().sum(), dict(made.named_parameters())[name])[0]

    assert torch.equal(run(x), by_ops(run, x))
    assert calls == [True]


@pytest.mark.parametrize(("options", "x_wants"), [("drop path", True), ("layer scale", False)])
@pytest.mark.parametrize("wanted", WANTED)
def test_leaves_out_the_products_that_the_ops_leave_out(wanted, options, x_wants, calls):
    made, x = block(BF16, **MORE[options]).train(), tokens(BF16).requires_grad_(x_wants)
    freeze_but(made, WANTED[wanted])
    if not (x_wants or wants_any(made.norm1, made.attn, made.ls1)):
        return

    def products(given):
        out = made(given)
        with torch.profiler.profile(record_shapes=True) as profile:
            out.backward(torch.ones_like(out))
        return sorted(event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm")

    for _ in range(2):
        assert products(x) == by_ops(products, x) != []
    assert calls == [True]


@pytest.mark.parametrize("tile", ["large", "small"])
def test_the_tile_of_the_largest_product(tile, calls, monkeypatch):
    monkeypatch.setattr(block_plan.hopper._tiles, "ACT_GRAD", tile)
    made, x = block(BF16), tokens(BF16).repeat(16, 4, 1).requires_grad_()  # rows enough for two tiles of each
    for _ in range(2):
        assert_same_step(made, x)
    assert calls == [True]


def test_parameters_that_hoppers_calls_do_not_take(calls, forwards):
    made, x = block(BF16), wanting()
    for _ in range(3):
        step(made, x)
    del calls[:], forwards[:]
    made.norm1.float()  # both of its parameters: float32 beside 16 bits is fine
    for _ in range(3):
        assert_same_step(made, x)
    made.mlp.fc2.weight = nn.Parameter(made.mlp.fc2.weight.detach().t().contiguous().t())
    assert_same_step(made, x)
    assert calls == [True, True, False]
    assert forwards == [True, True, False]


def test_gradients_of_other_layouts_go_by_the_ops(calls):
    made, x = block(BF16), wanting()
    for _ in range(3):
        step(made, x)
    del calls[:]
    made(x).sum().backward()  # expanded
    assert calls == [False]


def test_a_profilers_hook_hears_of_the_backwards_launches(calls):
    from fastvit.kernels import _launch

    made, x = block(BF16), wanting()
    for _ in range(3):
        step(made, x)
    del calls[:]
    out, hook = made(x), _launch.triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        out.backward(torch.ones_like(out))
    finally:
        hook.remove(print)
    assert calls == [False]


@pytest.mark.parametrize("shape", [(2, 70), (1, 130)], ids=str)
def test_hoppers_own_attention(shape, calls, monkeypatch):
    from hopper_attention import stand_in

    torch.manual_seed(0)
    made, x = layers.Block(128, 2, qkv_bias=True).to(BF16), torch.randn(*shape, 128).to(BF16).requires_grad_()
    with pytest.MonkeyPatch.context() as patch, use_backend(attention="cuda", attention_packed="cuda"):
        stand_in(patch, cuda_on_cpu.library)
        for _ in range(2):
            assert_same_step(made, x)
    assert calls == [True]


def test_an_error_of_a_launch_in_the_backward_is_no_misfit(calls, monkeypatch):
    made, x = block(BF16), wanting()
    for _ in range(3):
        step(made, x)
    out = made(x)
    monkeypatch.setenv(cuda_on_cpu.FAILURE, "701")
    with pytest.raises(RuntimeError, match="too many resources requested for launch"):
        out.backward(torch.ones_like(out))
