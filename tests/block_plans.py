"""What the tests of a block's plans share: blocks of every kind, and the same by the ops."""

from functools import partial
from unittest import mock

import torch
from test_host_path import HEADS, WIDTH
from torch import nn

from fastvit import block_plan, fused, layers


def runs_of_plans(monkeypatch):
    """Whether each call that has a plan from now on ran it."""
    ran, run = [], block_plan._run

    def counted(*args):
        out = run(*args)
        ran.append(out is not None)
        return out

    monkeypatch.setattr(block_plan, "_run", counted)
    return ran


def block(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return layers.Block(WIDTH, HEADS, **({"qkv_bias": True} | options)).eval().to(dtype)


def warm(made, x):
    """The block, whose plans are there now, and its input."""
    for _ in range(2):
        made(x), fused.class_token_block_forward(made, x)
    return made, x


def by_ops(made, x):
    none = mock.patch.object(fused, "run_blocks", side_effect=lambda blocks, x: (x, 0))
    with none, mock.patch.object(fused, "run_block", return_value=None):
        return made(x)


def outcome(call):
    """Its result, or its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def assert_as_by_ops(made, x):
    """All tokens; ``made`` is a block, or any function of one."""
    ours, expected = outcome(lambda: made(x)), outcome(lambda: by_ops(made, x))
    if isinstance(expected, tuple):
        assert ours == expected
    else:
        assert torch.equal(ours, expected)
        assert (ours.dtype, ours.shape, ours.requires_grad) == (expected.dtype, expected.shape, expected.requires_grad)


OPTIONS = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
    "quick": {"act_layer": layers.QuickGELU},
    "wide MLP": {"mlp_ratio": 6.0},
    "narrow MLP": {"mlp_ratio": 1.0},
}


def of_class_token(made):
    return partial(fused.class_token_block_forward, made)
