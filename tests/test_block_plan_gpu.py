"""A block in one call on a Hopper GPU, its training in one node: the bits of the ops, on any stream, in a CUDA graph.

The same tests run in small on the CPU, as kernels in loops: what they expect of a GPU is tried out there.
"""

from contextlib import ExitStack
from functools import partial

import cuda_on_cpu
import pytest
import torch
from block_plans import by_ops, runs_of_plans
from block_training import counted
from hopper_attention import stand_in

from fastvit import block_plan, fused, layers, use_backend

pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels import _launch

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HAS_PLANS = IS_HOPPER and _launch.REPLAYED and hasattr(torch.ops.fastvit_cuda, "block")
ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not HAS_PLANS, reason="plans are of compute capability 9.0"))
IN_SMALL = pytest.param("cpu", marks=pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not()))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=[ON_GPU, IN_SMALL])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def planned(device, monkeypatch):
    """Whether each call that had a plan ran it; no launch and no plan is there from before."""
    from hopper_on_cpu import hopper

    with torch.no_grad(), ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(hopper())
            stand_in(stack.enter_context(pytest.MonkeyPatch.context()), cuda_on_cpu.library)
        monkeypatch.setattr(block_plan, "_plans", {})
        monkeypatch.setattr(block_plan.hopper, "_packed", {})
        monkeypatch.setattr(_launch, "_kept", {})
        yield runs_of_plans(monkeypatch)


def block_and_input(device, batch, tokens, dtype=BF16, stream=None, heads=12, dim=64, **options):
    torch.manual_seed(0)
    if device == "cpu":
        batch, tokens, heads = min(batch, 2), min(tokens, 9), 2
    made = layers.Block(heads * dim, heads, qkv_bias=True, **options).to(device, dtype).eval()
    return made, torch.randn(batch, tokens, heads * dim, device=device).to(stream or dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("stream", ["same", "float32"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 197), (8, 197), (3, 50), (2, 577)])
def test_the_bits_of_the_ops(device, batch, tokens, stream, dtype, planned):
    made, x = block_and_input(device, batch, tokens, dtype, F32 if stream == "float32" else None, init_values=0.3)
    for forward in (made, partial(fused.class_token_block_forward, made)):
        first, second = forward(x), forward(x)
        assert torch.equal(first, second)
        assert torch.equal(forward(x + 1), by_ops(forward, x + 1))
    assert planned == [True] * 4


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dim"),
    [(1, 197, 12, 64), (8, 197, 12, 64), (2, 257, 12, 64), (3, 50, 12, 64), (1, 257, 16, 80), (16, 257, 16, 80)],
)
def test_hoppers_own_attention(device, batch, tokens, heads, dim, planned):
    """By name; its plan needs no launch before it."""
    made, x = block_and_input(device, batch, tokens, heads=heads, dim=dim)
    with use_backend(attention="cuda", attention_packed="cuda"):
        for forward in (made, partial(fused.class_token_block_forward, made)):
            assert torch.equal(forward(x), by_ops(forward, x))
    assert planned == [True] * 2


@pytest.mark.parametrize("attention", ["triton", "cuda"])
def test_many_blocks_one_after_the_other(device, attention, planned):
    """Each writes where the one before has read: the kernels overlap."""
    made, x = block_and_input(device, 1, 197)
    with use_backend(attention_packed=attention):
        made(x)
        planned.clear()
        expected = ours = x
        for _ in range(50):
            expected = by_ops(made, expected)
        for _ in range(50):
            ours = made(ours)
    assert torch.equal(ours, expected)
    assert planned == [True] * 50


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
def test_on_another_stream_and_in_a_graph(device, planned):
    made, x = block_and_input(device, 1, 197)
    expected = by_ops(made, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made(x)
        on_side = made(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(on_side, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made(x)
    x.add_(1)
    graph.replay()
    assert torch.equal(captured, by_ops(made, x))
    assert planned == [True] * 3  # the ops have made the launch before


@pytest.fixture
def backwards(monkeypatch):
    """Whether each backward that might be one call was."""
    return counted(monkeypatch, "backward")


def gradients(made, x, x_wants=True):
    made.zero_grad()
    given = x.detach().requires_grad_(x_wants)
    with torch.enable_grad():
        out = made(given)
        out.backward(torch.linspace(-1, 1, out.numel(), device=x.device).view(out.shape).to(out.dtype))
    return [out.detach(), given.grad, *(parameter.grad for parameter in made.parameters())]


def assert_trains_as_the_ops(made, x, x_wants=True):
    for i in range(4):
        torch.manual_seed(i)
        ours = gradients(made, x, x_wants)
        torch.manual_seed(i)
        expected = by_ops(lambda given: gradients(made, given, x_wants), x)
        for found, value in zip(ours, expected, strict=True):
            assert (found is None) == (value is None)
            assert value is None or torch.equal(found, value)


KINDS = {"layer scale": {"init_values": 0.3}, "drop path": {"drop_path": 0.3}}
KINDS["both"] = KINDS["layer scale"] | KINDS["drop path"]


@pytest.mark.parametrize(
    "kind", ["bfloat16", "float16", "float32 stream", "autocast", *KINDS, "both, autocast", "both, float16"]
)
@pytest.mark.parametrize(("batch", "tokens"), [(8, 197), (3, 50), (2, 577)])
def test_training_has_the_bits_of_the_ops(device, batch, tokens, kind, backwards):
    if device == "cpu" and tokens != 50:
        pytest.skip("in small they are all the same")
    dtype, options = (
        F32 if "autocast" in kind else F16 if "float16" in kind else BF16,
        KINDS.get(kind.split(",")[0], {}),
    )
    made, x = block_and_input(device, batch, tokens, dtype, F32 if "32" in kind else None, **options)
    made.train()
    with torch.autocast(device, BF16, enabled="autocast" in kind):
        assert_trains_as_the_ops(made, x)
    assert backwards == [True] * 3


@pytest.mark.parametrize("x_wants", [True, False])
@pytest.mark.parametrize("wanted", ["norm", "bias", "attn.qkv.weight", "attn.proj", "mlp.fc1.bias", "attn", "ls"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_frozen_parameters(device, kind, wanted, x_wants, backwards):
    """Those with another name."""
    made, x = block_and_input(device, 8, 197, **KINDS[kind])
    for name, parameter in made.train().named_parameters():
        parameter.requires_grad_(wanted in name)
    if not x_wants and wanted == "ls" and kind == "drop path":
        return  # nothing at all
    assert_trains_as_the_ops(made, x, x_wants)
    is_node = x_wants or wanted != "mlp.fc1.bias"
    assert backwards == [True] * (3 if is_node else 0)


@pytest.mark.parametrize("tokens", [197, 129])
def test_training_by_hoppers_own_attention(device, tokens, backwards):
    made, x = block_and_input(device, 4, tokens)
    if device == "cpu":
        x = x[:1, :1].repeat(1, 70, 1)  # fewer have no such backward
    with use_backend(attention="cuda", attention_packed="cuda"):
        for _ in range(3):
            ours, expected = gradients(made, x), by_ops(lambda given: gradients(made, given), x)
            assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    assert backwards == [True] * 2


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
def test_many_blocks_train_one_after_the_other(device, backwards):
    made, x = block_and_input(device, 2, 197)
    deep = torch.nn.Sequential(*[made] * 20)
    gradients(made, x)
    for _ in range(3):
        ours, expected = gradients(deep, x), by_ops(lambda given: gradients(deep, given), x)
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    assert backwards == [True] * 60
