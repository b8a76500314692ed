"""What the tests of a block's training share: blocks on every way, a step, and the same by the ops."""

import cuda_on_cpu
import pytest
import torch
from block_plans import OPTIONS, by_ops
from test_host_path import tokens

from fastvit import block_plan

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def on_hopper():
    pytest.importorskip("triton", reason="triton is not installed")
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    from hopper_on_cpu import hopper

    return hopper()


def counted(monkeypatch, name):
    """Whether each call of that function of block_plan.hopper had a result."""
    ran, call = [], getattr(block_plan.hopper, name)

    def run(*args):
        found = call(*args)
        ran.append(found is not None)
        return found

    monkeypatch.setattr(block_plan.hopper, name, run)
    return ran


def step(made, x, seed=3):
    """What comes out, and the gradients of x and of every parameter, by name."""
    torch.manual_seed(seed)
    made.zero_grad()
    given = x.detach().requires_grad_(x.requires_grad)
    out = made(given)
    weights = torch.linspace(-1, 1, out.numel(), dtype=F32, device=out.device).view(out.shape).to(out.dtype)
    out.backward(weights)
    return {"out": out.detach(), "x": given.grad} | {name: p.grad for name, p in made.named_parameters()}


def assert_same_step(made, x, seed=3):
    ours, expected = step(made, x, seed), by_ops(lambda given: step(made, given, seed), x)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] is None) == (value is None), name
        if value is not None:
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
    return ours


def wanting(dtype=BF16):
    return tokens(dtype).requires_grad_()


class Around:
    """Another call of a block, with its parameters."""

    def __init__(self, made, call):
        self.call, self.zero_grad, self.named_parameters = call, made.zero_grad, made.named_parameters

    def __call__(self, x):
        return self.call(x)


MORE = OPTIONS | {
    "drop path": {"drop_path": 0.4},
    "both scales": {"drop_path": 0.4, "init_values": 0.3},
    "layer scale, no biases": {"init_values": 0.3, "qkv_bias": False, "proj_bias": False},
}
