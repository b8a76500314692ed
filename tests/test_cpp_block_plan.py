"""A block's inference on a CPU in one call: the bits of the ops, and never a plan where anything is unusual."""

import threading
from unittest import mock

import pytest
import torch
from block_plans import OPTIONS, assert_as_by_ops, block, by_ops, of_class_token, outcome, runs_of_plans, warm
from test_host_path import CHANGES, WIDTH, tokens
from torch import nn

import fastvit
from fastvit import block_plan, fused, layers, packs
from fastvit.dispatch import OPS, explaining, recording, use_backend
from fastvit.layers import LayerScale

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Whether each call that had a plan ran it."""
    monkeypatch.setattr(block_plan, "_plans", {})
    for op in OPS.values():
        monkeypatch.setattr(op, "_settled", {})
    with torch.no_grad():
        yield runs_of_plans(monkeypatch)


def warmed(dtype=F32, **options):
    return warm(block(dtype, **options), tokens(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_bits_of_the_ops(options, dtype, planned):
    made, x = block(dtype, **OPTIONS[options]), tokens(dtype)
    for forward in (made, of_class_token(made)):
        assert torch.equal(forward(x), forward(x))
        assert_as_by_ops(forward, x.flip(0) + 1)
    assert planned == [True] * 4


@pytest.mark.parametrize("weights", [BF16, F16], ids=str)
def test_a_float32_stream(weights, planned):
    made, x = block(weights), tokens(F32)
    for _ in range(3):
        assert_as_by_ops(made, x)
    assert planned == [True, True]


def test_all_blocks_of_a_model(planned):
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    first, second = model(images), model(images)
    assert torch.equal(first, second)
    assert planned == [True] * 22  # the first block's plan is there for the second one; the last has one of its own
    assert_as_by_ops(model, images)


def planned_model():
    model, images = (
        fastvit.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval(),
        torch.randn(2, 3, 32, 32),
    )
    model(images), model(images)
    return model, images


def test_blocks_are_looked_at_before_the_first_one_runs(planned, monkeypatch):
    model, images = planned_model()
    seen = []
    monkeypatch.setattr(fused, "run_block", lambda *args, **options: seen.append(options))
    monkeypatch.setattr(
        fused, "read_block", lambda block, read=fused.read_block: seen.append(len(planned)) or read(block)
    )
    planned.clear()
    model(images)
    assert seen == [0] * 11 + [11, {"class_token": True}]
    assert planned == [True] * 11
    seen.clear()
    with torch.enable_grad():
        model(images)
    assert len(seen) == 24
    model.set_grad_checkpointing()
    planned.clear()
    model(images)
    assert planned == []


def _hook(block, calls):
    block.register_forward_hook(lambda *args: calls.append(1))


def _forward_of_its_own(block, calls):
    block.forward = lambda x: calls.append(1) or 2 * x


def _class_of_its_own(block, calls):
    class Twice(layers.Block):
        def forward(self, x):
            calls.append(1)
            return 2 * super().forward(x)

    block.__class__ = Twice


def _compiled(block, calls):
    block._compiled_call_impl = lambda x: calls.append(1) or 2 * x


def test_another_forward_of_all_blocks_is_called(monkeypatch):
    model, images = planned_model()
    calls, forward = [], layers.Block.forward
    monkeypatch.setattr(layers.Block, "forward", lambda self, x: calls.append(1) or forward(self, x))
    model(images)
    assert len(calls) == 11  # the last block is run for its class token


@pytest.mark.parametrize("change", [_hook, _forward_of_its_own, _class_of_its_own, _compiled], ids=lambda c: c.__name__)
def test_a_block_that_wants_to_be_called_is(change):
    model, images = planned_model()
    calls = []
    before = model(images)
    change(model.blocks[5], calls)
    after = model(images)
    assert len(calls) == 1
    assert torch.equal(before, after) == (change is _hook)
    assert_as_by_ops(model, images)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_plan_was_made_counts(change):
    made, x = warmed()
    before = made(x)
    CHANGES[change](made)
    for _ in range(3):
        assert_as_by_ops(made, x)
        assert_as_by_ops(of_class_token(made), x)
    assert not torch.equal(made(x), before)


MISFITS = {
    "weight in float64": lambda b: b.mlp.fc1.double(),
    "weight in bfloat16": lambda b: b.mlp.fc2.bfloat16(),
    "norm in float64": lambda b: b.norm2.double(),
    "norm in bfloat16": lambda b: b.norm1.bfloat16(),
    "shape of a weight": lambda b: setattr(b.attn.proj, "weight", nn.Parameter(torch.randn(WIDTH, 8))),
    "shape of a bias": lambda b: setattr(b.attn.proj, "bias", nn.Parameter(torch.randn(8))),
    "norm of another width": lambda b: setattr(b, "norm1", nn.LayerNorm(WIDTH - 8)),
    "layer scale in float64": lambda b: setattr(b, "ls2", LayerScale(WIDTH, dtype=torch.float64)),
    "heads that do not divide": lambda b: setattr(b.attn, "num_heads", 5),
    "transposed weight": lambda b: setattr(b.mlp.fc2, "weight", nn.Parameter(b.mlp.fc2.weight.t().contiguous().t())),
    "weight on another device": lambda b: setattr(b.mlp.fc1, "weight", nn.Parameter(b.mlp.fc1.weight.to("meta"))),
}


@pytest.mark.filterwarnings("ignore:fastvit")
@pytest.mark.parametrize("change", MISFITS)
def test_an_unusual_parameter_is_taken_or_refused_as_ever(change):
    made, x = warmed()
    MISFITS[change](made)
    for _ in range(3):
        assert_as_by_ops(made, x)
        assert_as_by_ops(of_class_token(made), x)


def _inputs():
    x = tokens(F32)
    memory = torch.randn(4 * x.numel(), generator=torch.Generator().manual_seed(2))
    yield "rows of a wider buffer", memory[: 2 * x.numel()].view(2, 5, 2 * WIDTH)[..., :WIDTH]
    yield "every other sample", memory[: 2 * x.numel()].view(4, 5, WIDTH)[::2]
    yield "tokens first", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "every other value", memory[: 2 * x.numel()].view(2, 5, WIDTH, 2)[..., 0]
    yield "expanded", x[:1].expand(2, -1, -1)
    yield "one token", x[:, :1]
    yield "no sample", x[:0]
    yield "no batch", x[0]
    yield "one dimension more", x[None]
    yield "float64", x.double()


@pytest.mark.filterwarnings("ignore:fastvit")
@pytest.mark.parametrize(("name", "x"), list(_inputs()), ids=lambda value: value if type(value) is str else "")
def test_inputs_of_every_layout(name, x):
    made, _ = warmed()
    for _ in range(3):
        assert_as_by_ops(made, x)
        assert_as_by_ops(of_class_token(made), x)


def test_packs_are_kept_only_where_wanted(planned):
    made, x = warmed()
    expected = made(x)
    packs.clear_pack_cache()
    with packs.unkept_packs():
        for _ in range(3):
            assert torch.equal(made(x), expected)
        assert packs.pack_bytes() == 0
    made(x)
    assert packs.pack_bytes() > 0


def test_new_values_are_seen(planned):
    made, x = warmed()
    before = made(x)
    made.attn.qkv.weight.mul_(1.5)
    made.mlp.fc2.weight.data.copy_(torch.randn_like(made.mlp.fc2.weight))
    assert_as_by_ops(made, x)
    assert not torch.equal(made(x), before)


def test_lean_memory_has_plans_too(planned):
    made, x = block(F32), tokens(F32)
    expected = by_ops(made, x)
    for _ in range(3):
        assert torch.equal(fused.block_forward(made, x, memory="lean"), expected)
    assert planned == [True, True]


@pytest.mark.parametrize("watcher", [recording, explaining], ids=lambda w: w.__name__)
def test_watchers_see_the_ops(watcher, planned):
    made, x = warmed()
    planned.clear()
    with watcher() as seen:
        made(x)
    assert len(seen) == 4
    assert planned == []


@pytest.mark.parametrize("op", ["layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp"])
def test_the_users_choice_holds(op, planned):
    made, x = warmed()
    planned.clear()
    with use_backend(**{op: "torch"}):
        for _ in range(3):
            assert_as_by_ops(made, x)
        assert planned == []
    with mock.patch.dict(OPS[op].backends):
        del OPS[op].backends["cpp"]
        made(x)
    assert planned == []
    made(x)
    assert planned == [True]


def test_training_and_gradients(planned):
    made, x = warmed(drop_path=0.5)
    planned.clear()
    made.train()(x)
    made.eval()
    with torch.enable_grad():
        assert made(x).requires_grad
        assert planned == []
        made.requires_grad_(False)
        for _ in range(2):
            assert not made(x).requires_grad
        assert planned == [True]
        assert made(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert made(x).is_inference()
    assert planned == [True, True]


def test_autocast_and_hooks(planned):
    made, x = warmed()
    planned.clear()
    with torch.autocast("cpu", dtype=BF16):
        assert_as_by_ops(made, x)
    calls = []
    with made.norm2.register_forward_hook(lambda *args: calls.append(1)):
        assert_as_by_ops(made, x)
    assert len(calls) == 2
    assert planned == []


def test_compiled_as_ever(planned):
    made, x = warmed()
    expected = made(x)
    planned.clear()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert planned == []


def test_several_threads_at_once():
    made, x = block(F32), tokens(F32)
    expected = by_ops(made, x)
    wrong = []

    def call():
        with torch.no_grad():
            wrong.extend(i for i in range(30) if not torch.equal(made(x), expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_op_itself_refuses_what_does_not_fit():
    made, x = block(F32), tokens(F32)
    parts = fused.read_block(made)
    given = (*parts.norm1, *parts.qkv, *parts.proj, parts.gamma1, *parts.mlp, parts.gamma2)
    settings = (parts.heads[0], parts.heads[2], 1e-6, 1e-6, "gelu", False, False)
    assert outcome(lambda: C.block_fwd(x[0], *given, *settings)) == (
        ValueError,
        f"block: x has shape (5, {WIDTH}), expected (B, N, E)",
    )
    with pytest.raises(ValueError, match=r"block: qkv_weight has shape .*, expected \(3 H D, E\) for H = 7 heads"):
        C.block_fwd(x, *given, 7, *settings[1:])


def test_an_input_that_could_have_a_gradient(planned):
    made, x = block(F32), tokens(F32).requires_grad_()
    for _ in range(3):
        assert_as_by_ops(made, x)
        assert_as_by_ops(of_class_token(made), x)
    assert planned == [True] * 4
