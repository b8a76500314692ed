"""A block's training in one node: the bits of the ops, forward and backward, and no node where anything is unusual."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from block_plans import block, by_ops
from block_training import BF16, F16, F32, MORE, Around, assert_same_step, on_hopper, step, wanting
from test_host_path import WIDTH, tokens
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import block_plan, fused, layers
from fastvit.dispatch import OPS, explaining, recording, use_backend


def _on_cpu(monkeypatch):
    pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
    monkeypatch.setattr(block_plan, "_plans", {})
    for op in OPS.values():
        monkeypatch.setattr(op, "_settled", {})
    return nullcontext()


WAYS = {"cpp": _on_cpu, "hopper": lambda monkeypatch: on_hopper()}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    with WAYS[request.param](monkeypatch):
        yield request.param


@pytest.fixture
def nodes(way, monkeypatch):
    """One entry for each call that ran as one node."""
    ran, run = [], block_plan.training.run
    monkeypatch.setattr(block_plan.training, "run", lambda *args: ran.append(1) or run(*args))
    return ran


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", MORE)
def test_the_bits_of_the_ops(options, dtype, way, nodes):
    if way == "hopper" and dtype == F32:
        pytest.skip("Hopper's kernels take 16 bits")
    made, x = block(dtype, **MORE[options]).train(), wanting(dtype)
    first, second = step(made, x), assert_same_step(made, x)
    assert all(torch.equal(first[name], value) for name, value in second.items() if value is not None)
    assert all(value is not None for value in second.values())
    assert second["out"].std() > 0.1
    assert nodes == [1]
    assert_same_step(made, x.flip(0).detach().requires_grad_())
    assert nodes == [1, 1]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", MORE)
def test_the_class_tokens_block(options, dtype, way, nodes):
    if way == "hopper" and dtype == F32:
        pytest.skip("Hopper's kernels take 16 bits")
    made, x = block(dtype, **MORE[options]).train(), wanting(dtype)
    token = Around(made, lambda given: fused.class_token_block_forward(made, given))
    step(token, x)
    found = assert_same_step(token, x)
    assert found["out"].shape == (2, 1, WIDTH)
    assert all(value is not None for value in found.values())
    assert nodes == [1]
    with torch.autocast("cpu", dtype=BF16):
        for _ in range(2):
            assert_same_step(token, x.detach().float().requires_grad_())


@pytest.mark.parametrize("x_wants", [True, False])
@pytest.mark.parametrize(
    "name", ["norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.bias", "mlp.fc1.weight"]
)
def test_frozen_parameters_of_the_class_tokens_block(name, x_wants, nodes):
    made, x = block(BF16), tokens(BF16).requires_grad_(x_wants)
    token = Around(made, lambda given: fused.class_token_block_forward(made, given))
    for other, parameter in made.named_parameters():
        parameter.requires_grad_(other == name)
    for _ in range(2):
        assert_same_step(token, x)
    assert nodes == ([] if name.startswith("mlp") and not x_wants else [1])


def test_the_class_tokens_block_of_other_sizes(nodes):
    made = block(BF16)
    token = Around(made, lambda given: fused.class_token_block_forward(made, given))
    for shape in ((1, 5), (3, 1), (2, 9), (0, 5)):
        x = torch.randn(*shape, WIDTH).to(BF16).requires_grad_()
        for _ in range(2):
            assert_same_step(token, x)
    assert nodes


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_float32_stream_beside_weights_in_16_bits(dtype, nodes):
    made, x = block(dtype), wanting(F32)
    for _ in range(2):
        assert_same_step(made, x)
    assert nodes == [1]


def test_lean_memory(nodes):
    made, x = block(BF16), wanting()
    lean = Around(made, lambda given: fused.block_forward(made, given, memory="lean"))
    for _ in range(2):
        assert_same_step(lean, x)
    assert nodes == [1]
    step(made, x)
    assert 1.5 * saved_bytes(lean, x, made) < saved_bytes(made, x, made)


def saved_bytes(call, x, made):
    """Of what is kept for the backward, but for inputs and parameters."""
    known = {x.data_ptr(), *(p.data_ptr() for p in made.parameters())}
    out = call(x)  # which keeps the nodes' tensors
    kept, seen, nodes = {}, set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            tensors = getattr(node, "saved_tensors", ())
            kept |= {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
            nodes += [following for following, _ in node.next_functions]
    return sum(size for address, size in kept.items() if address not in known)


def test_keeps_what_the_ops_keep(nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    expected = by_ops(lambda given: saved_bytes(made, given, made), x)
    assert saved_bytes(made, x, made) == expected > 0
    assert nodes == [1]


NAMES = [name for name, _ in layers.Block(WIDTH, 4, qkv_bias=True, init_values=0.1).named_parameters()]


@pytest.mark.parametrize("name", [*NAMES, "x"])
def test_one_gradient_alone(name, nodes):
    made, x = block(BF16, init_values=0.3), wanting()
    step(made, x)

    def run(given):
        asked = given if name == "x" else dict(made.named_parameters())[name]
        return torch.autograd.grad(made(given).float().square().sum(), asked)[0]

    assert torch.equal(run(x), by_ops(run, x))
    assert nodes == [1]


@pytest.mark.parametrize("x_wants", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "nothing", "all but it"])
def test_frozen_parameters(name, x_wants, nodes):
    made, x = block(BF16, init_values=0.3), tokens(BF16).requires_grad_(x_wants)
    for other, parameter in made.named_parameters():
        parameter.requires_grad_((other == name) != (name == "all but it"))
    if name == "all but it":
        made.attn.proj.weight.requires_grad_(False)
    if name == "nothing" and not x_wants:
        assert not made(x).requires_grad
        return
    for _ in range(2):
        found = assert_same_step(made, x)
        assert (found["x"] is not None) == x_wants
    in_branch = name.startswith(("norm1", "attn", "ls1")) or name == "all but it"
    assert nodes == ([1] if x_wants or in_branch else [])


@pytest.mark.parametrize("options", ["plain", "both scales", "no biases"])
def test_autocast(options, way, nodes):
    """Weights in float32, as most people train."""
    made, x = block(F32, **MORE[options]).train(), wanting(F32)
    before = dict(made.named_parameters())
    with torch.autocast("cpu", dtype=BF16):
        for _ in range(3):
            found = assert_same_step(made, x)
    assert nodes == [1] * 2
    assert all(found[name].dtype == F32 for name in before)
    assert found["out"].dtype == F32


def test_backward_outside_autocast(way, nodes):
    made, x = block(F32), wanting(F32)

    def half_step(given):
        made.zero_grad()
        given = given.detach().requires_grad_()
        with torch.autocast("cpu", dtype=BF16):
            out = made(given)
        out.sum().backward()
        return [given.grad, *(p.grad for p in made.parameters())]

    for _ in range(2):
        for ours, expected in zip(half_step(x), by_ops(half_step, x), strict=True):
            assert torch.equal(ours, expected)
    assert nodes == [1]


@pytest.mark.parametrize("of", ["block", "class token"])
@pytest.mark.parametrize("options", ["layer scale", "both scales"])
def test_a_second_derivative(options, of, nodes, way):
    made, x = block(F32 if way == "cpp" else BF16, **MORE[options]).train(), wanting(F32 if way == "cpp" else BF16)

    def penalty(given):
        torch.manual_seed(3)
        made.zero_grad()
        given = given.detach().requires_grad_()
        (slope,) = torch.autograd.grad(call(given).square().sum(), given, create_graph=True)
        slope.square().sum().backward()
        return [slope.detach(), given.grad, *(p.grad for p in made.parameters())]

    call = made if of == "block" else Around(made, lambda given: fused.class_token_block_forward(made, given))
    step(call, x)
    ours, expected = penalty(x), by_ops(penalty, x)
    assert nodes == [1]
    for mine, other in zip(ours, expected, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(mine / scale, other / scale, rtol=0, atol=2e-5 if way == "cpp" else 0.05)


@pytest.mark.parametrize("warm", [False, True])
def test_checkpointed(warm, nodes):
    """As many tensors are saved the second time as the first, whatever was planned in between."""
    made, x = block(BF16), wanting()
    if warm:
        step(made, x)
    checkpointed = Around(made, lambda given: made(checkpoint(made, given, use_reentrant=False)))
    for _ in range(2):
        step(checkpointed, x)
        assert_same_step(checkpointed, x)
    assert len(nodes) == 4  # those that are not checkpointed


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_trains(reentrant, way, monkeypatch):
    if reentrant:
        monkeypatch.setattr(
            fastvit.model, "checkpoint", lambda call, *args, **_: checkpoint(call, *args, use_reentrant=True)
        )
    torch.manual_seed(0)
    dtype = F32 if way == "cpp" else BF16
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=3).to(dtype).train()
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    with use_backend(patch_embed="torch"):
        expected = step(model, images)
        model.set_grad_checkpointing()
        for _ in range(3):
            for name, value in step(model, images).items():
                assert (value is None) == (expected[name] is None)
                assert value is None or torch.equal(value, expected[name]), name


def test_a_parameter_changed_before_the_backward_is_an_error(nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    out = made(x)
    with torch.no_grad():
        made.mlp.fc1.weight.mul_(2)
    assert nodes == [1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_of_every_layout(nodes):
    made = block(BF16)
    wide = torch.randn(2, 5, 2 * WIDTH).to(BF16)
    for x in (wide[..., :WIDTH], wide[..., ::2], tokens(BF16).transpose(0, 1).contiguous().transpose(0, 1)):
        for _ in range(3):
            assert_same_step(made, x.requires_grad_())
    assert nodes


@pytest.mark.parametrize("gradient", ["expanded", "strided", "of a part"])
def test_gradients_of_every_layout(gradient, nodes):
    made, x = block(BF16), wanting()

    def run(given):
        made.zero_grad()
        given = given.detach().requires_grad_()
        out = made(given)
        if gradient == "expanded":
            out.sum().backward()
        elif gradient == "strided":
            out.backward(
                torch.randn(*out.shape[:2], 2 * WIDTH, generator=torch.Generator().manual_seed(1)).to(BF16)[..., ::2]
            )
        else:
            out[:, 0].square().sum().backward()
        return [given.grad, *(p.grad for p in made.parameters())]

    for _ in range(2):
        for ours, expected in zip(run(x), by_ops(run, x), strict=True):
            assert torch.equal(ours, expected)
    assert nodes == [1]


class Seeing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watcher", [Seeing, recording, explaining], ids=lambda w: w.__name__)
def test_watchers_see_the_ops(watcher, nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    with watcher():
        assert_same_step(made, x)
    assert nodes == []
    step(made, x)
    assert nodes == [1]


def test_a_default_device_watches_nothing(nodes):
    """It is a mode, in which a script may run from its first line on."""
    made, x = block(BF16), wanting()
    with torch.device("meta"):  # nothing is made on it
        for _ in range(2):
            step(made, x)
        assert_same_step(made, x)
        assert nodes == [1, 1]
        with Seeing():
            step(made, x)
    assert nodes == [1, 1]


@pytest.mark.parametrize("op", ["layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp"])
def test_the_users_choice_holds(op, nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    with use_backend(**{op: "torch"}):
        for _ in range(2):
            assert_same_step(made, x)
    assert nodes == []
    step(made, x)
    assert nodes == [1]


def test_what_drops_or_normalises_heads_is_run_by_ops(nodes):
    x = wanting()
    for options in ({"attn_drop": 0.3}, {"proj_drop": 0.3}, {"qk_norm": True}):
        made = block(BF16, **options).train()
        with use_backend(attention_packed="torch"):
            for _ in range(2):
                assert_same_step(made, x)
    assert nodes == []


def test_other_sizes_and_wrong_ones(nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    for shape in ((1, 5), (3, 5), (2, 9), (2, 1), (0, 5)):
        other = torch.randn(*shape, WIDTH).to(BF16).requires_grad_()
        for _ in range(2):
            assert_same_step(made, other)
    with pytest.raises(ValueError, match="norm_weight has shape"):
        made(torch.randn(2, 5, WIDTH - 8, dtype=BF16, requires_grad=True))


def test_whole_models_train_alike(way, nodes):
    dtype = F32 if way == "cpp" else BF16
    torch.manual_seed(0)
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).to(dtype).train()
    images, stack = torch.randn(2, 3, 32, 32, dtype=dtype), ExitStack()
    if way == "hopper":
        stack.enter_context(use_backend(patch_embed="torch"))
    with stack:
        for _ in range(2):
            assert_same_step(model, images)
    assert len(nodes) == 10 + 12  # the first block of each kind is run by the ops in the first step


def test_a_hook_on_a_part_is_called(nodes):
    made, x, calls = block(BF16), wanting(), []
    step(made, x)
    made.attn.proj.register_forward_hook(lambda *args: calls.append(1))
    assert_same_step(made, x)
    assert len(calls) == 2
    assert nodes == []


def test_two_uses_of_one_block(nodes):
    """Gradients of both add up."""
    made, x = block(BF16), wanting()
    step(made, x)

    assert_same_step(Around(made, lambda given: made(made(given))), x)
    assert nodes == [1, 1]


def test_no_gradient_comes_back(nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    first, second = made(x), nn.Parameter(torch.ones(1))
    grads = torch.autograd.grad((0 * second).sum() + second.sum(), [second, x], allow_unused=True)
    assert grads[1] is None
    assert first.requires_grad


@pytest.mark.parametrize("of", ["block", "class token"])
def test_several_gradients_at_once(of, nodes):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them: by the ops' kernels, one after another."""
    made, x = block(BF16, init_values=0.3), wanting()
    call = made if of == "block" else Around(made, lambda given: fused.class_token_block_forward(made, given))
    step(call, x)

    def run(given):
        out, asked, several = gradients_to_come(made, call, given)
        together = torch.autograd.grad(out, asked, several, is_grads_batched=True, retain_graph=True)
        for at, dout in enumerate(several):
            for found, expected in zip(together, torch.autograd.grad(out, asked, dout, retain_graph=True), strict=True):
                assert torch.equal(found[at], expected)
        return together

    for ours, expected in zip(run(x), by_ops(run, x), strict=True):
        assert torch.equal(ours, expected)
    assert nodes == [1]


def gradients_to_come(made, call, given):
    """What comes out, tensors whose gradients are asked for, and several gradients of what comes out."""
    out = call(given)
    several = torch.stack((torch.ones_like(out), torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)))
    return out, [given, made.attn.qkv.weight, made.mlp.fc2.bias], several


@pytest.mark.parametrize("of", ["block", "class token"])
def test_vmap_over_gradients(of, way, nodes):
    """As PyTorch's manual has it; torch.func has no rules for kernels."""
    made, x = block(BF16, init_values=0.3), wanting()
    call = made if of == "block" else Around(made, lambda given: fused.class_token_block_forward(made, given))
    step(call, x)
    out, asked, several = gradients_to_come(made, call, x)
    one_by_one = [torch.autograd.grad(out, asked, dout, retain_graph=True) for dout in several]
    with use_backend("torch") if way == "hopper" else nullcontext():  # the model of a GPU refuses nothing
        together = torch.vmap(lambda dout: torch.autograd.grad(out, asked, dout))(several)
    assert nodes == [1]
    for found, *expected in zip(together, *one_by_one, strict=True):
        scale = torch.stack(expected).abs().max()
        torch.testing.assert_close(found / scale, torch.stack(expected) / scale, rtol=0, atol=0.03)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_around_the_backward_sees_the_ops(nodes):
    made, x = block(BF16), wanting()
    step(made, x)
    expected = step(made, x)
    made.zero_grad()
    out = made(x)
    with Dispatched() as mode:
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    for op in ("layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp"):
        assert f"fastvit.{op}_bwd.default" in mode.seen
    assert nodes == [1, 1]
    assert torch.equal(x.grad, expected["x"])
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
