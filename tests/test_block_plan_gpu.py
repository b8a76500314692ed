"""A block's inference in one call on a Hopper GPU: the bits of the ops, on any stream, in a CUDA graph."""

from functools import partial

import pytest
import torch
from block_plans import by_ops, runs_of_plans

from fastvit import block_plan, fused, layers, use_backend

pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels import _launch

HAS_PLANS = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and _launch.REPLAYED
pytestmark = pytest.mark.skipif(
    not (HAS_PLANS and hasattr(torch.ops.fastvit_cuda, "block")), reason="blocks have plans on compute capability 9.0"
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    monkeypatch.setattr(block_plan, "_plans", {})
    with torch.no_grad():
        yield runs_of_plans(monkeypatch)


def block_and_input(batch, tokens, dtype=BF16, stream=None, width=768, **options):
    torch.manual_seed(0)
    made = layers.Block(width, width // 64, qkv_bias=True, **options).cuda().to(dtype).eval()
    return made, torch.randn(batch, tokens, width, device="cuda").to(stream or dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("stream", ["same", "float32"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 197), (8, 197), (3, 50), (2, 577)])
def test_the_bits_of_the_ops(batch, tokens, stream, dtype, planned):
    made, x = block_and_input(batch, tokens, dtype, F32 if stream == "float32" else None, init_values=0.3)
    for forward in (made, partial(fused.class_token_block_forward, made)):
        first, second = forward(x), forward(x)
        assert torch.equal(first, second)
        assert torch.equal(forward(x + 1), by_ops(forward, x + 1))
    assert planned == [True] * 4


@pytest.mark.parametrize(("batch", "tokens"), [(1, 197), (8, 197), (2, 257), (3, 50)])
def test_hoppers_own_attention(batch, tokens, planned):
    """By name; its plan needs no launch before it."""
    made, x = block_and_input(batch, tokens)
    with use_backend(attention="cuda", attention_packed="cuda"):
        for forward in (made, partial(fused.class_token_block_forward, made)):
            assert torch.equal(forward(x), by_ops(forward, x))
    assert planned == [True] * 2


@pytest.mark.parametrize("attention", ["triton", "cuda"])
def test_many_blocks_one_after_the_other(attention, planned):
    """Each writes where the one before has read: the kernels overlap."""
    made, x = block_and_input(1, 197)
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


def test_on_another_stream_and_in_a_graph(planned):
    made, x = block_and_input(1, 197)
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
    assert planned == [True, True]
