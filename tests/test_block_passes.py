"""How often one block goes over memory in training, counted without a GPU: the CUDA composition on plain PyTorch.

Every call of the kernels (cuda_passes.py stands in for them) and every ATen op that reads or writes tokens is listed.
Weights are left out: their casts and gradients are small beside the tokens of a batch.
"""

from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from cuda_passes import PASSES, PRODUCTS
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import fused
from fastvit.dispatch import OPS
from fastvit.layers import Block
from fastvit.ops import _contract, _cuda, _sm90

BATCH, TOKENS, DIM = 2, 17, 48
ROWS = BATCH * TOKENS  # divides no weight's number of elements
FREE = {"empty", "empty_like", "new_empty"}
PRODUCTS_OF_PYTORCH = {"mm", "addmm", "matmul", "linear"}


class Passes(TorchDispatchMode):
    """Lists what touches tokens, the kernels' stand-ins as one entry each."""

    def __init__(self):
        super().__init__()
        self.seen, self.inside = [], False

    @contextmanager
    def kernel(self, name):
        self.seen.append(name)
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvit":  # what it does is what counts: run its parts in this mode
            op, _, direction = func._opname.rpartition("_")
            with self:
                return getattr(import_module(f"fastvit.ops.{op}"), f"_{direction}")(*args)
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        name = "product" if name in PRODUCTS_OF_PYTORCH else name
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if not self.inside and any(map(is_of_tokens, tensors)) and not is_free(name, args, result):
            self.seen.append(name)
        return result


def is_free(name, args, result):
    """An allocation, or a view of an argument."""
    if name in FREE or name.endswith("_") or not isinstance(result, torch.Tensor):
        return name in FREE
    return result.untyped_storage().data_ptr() in {
        t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)
    }


def is_of_tokens(tensor):
    return tensor.numel() >= ROWS * DIM and tensor.numel() % ROWS == 0


@pytest.fixture
def count(monkeypatch):
    """A function of (capability, autocast dtype or None): the passes of one block's forward, and of its backward."""

    def attention(passes):
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, qkv):
                with passes.kernel("attention"):
                    return qkv[..., :DIM].clone()

            @staticmethod
            def backward(ctx, dout):
                with passes.kernel("attention"):
                    return torch.cat([dout, dout, dout], -1)

        return lambda qkv, *_, **__: Attention.apply(qkv)

    def stand_in(passes, function):
        def run(*arguments):
            with passes.kernel(function.__name__):
                return function(*arguments)

        return run

    def run(capability, dtype, layer_scale):
        passes = Passes()
        functions = {f.__name__: stand_in(passes, f) for f in PASSES + PRODUCTS}
        monkeypatch.setattr(_cuda, "ops", SimpleNamespace(**functions))
        monkeypatch.setattr(_cuda, "_float32_product", lambda a, b: a @ b.to(a.dtype))  # one product, as on a GPU
        monkeypatch.setattr(_sm90, "device_facts", lambda index: (capability, 132))
        monkeypatch.setattr(_contract, "why_not_compiled", lambda *_, **__: [])
        for op in OPS.values():  # no verdict of these stand-ins outlives the test
            monkeypatch.setattr(op, "_settled", {})
        monkeypatch.setattr(fused, "attention_packed", attention(passes))
        block = Block(DIM, 3, mlp_ratio=2, qkv_bias=True, init_values=0.1 if layer_scale else None)
        x = torch.randn(BATCH, TOKENS, DIM)
        if dtype is None:
            block, x = block.bfloat16(), x.bfloat16()
        x = x.requires_grad_()
        with passes, fastvit.use_backend("cuda"):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                out = fused.block_forward(block, x)
            forward, passes.seen = passes.seen, []
            out.backward(torch.randn_like(out))
        return forward, [name for name in passes.seen if name not in ("normal_", "randn_like")]

    return run


MLP_FORWARD = ["layernorm_fwd", "linear_act", "linear_residual"]
FORWARD = ["layernorm_fwd", "linear_act", "attention", "linear_residual", *MLP_FORWARD]
MLP_BACKWARD = ["linear_act_grad", "product", "product", "layernorm_bwd", "product"]
ATTENTION_BACKWARD = ["product", "product", "attention", "column_sum", "product", "layernorm_bwd", "product"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_under_autocast_on_hopper(count, dtype):
    """LayerNorm reads float32 and writes 16 bits; products add the residual; a gradient is cast and summed in one pass.

    The residual's gradients need no pass: LayerNorm's backward adds them.
    """
    forward, backward = count((9, 0), dtype, layer_scale=False)
    assert forward == FORWARD
    assert backward == ["scale", *MLP_BACKWARD, "scale", *ATTENTION_BACKWARD]


def test_block_in_bfloat16_on_hopper(count):
    forward, backward = count((9, 0), None, layer_scale=False)
    assert forward == FORWARD
    assert backward == ["column_sum", *MLP_BACKWARD, "column_sum", *ATTENTION_BACKWARD]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_block_with_cublas(count, dtype):
    """Elsewhere activation and residual are one pass each, and nothing is copied or cast between them."""
    forward, backward = count((8, 0), dtype, layer_scale=False)
    branch = ["product", "scale_residual_fwd"]
    assert forward == ["layernorm_fwd", "product", "attention", *branch, "layernorm_fwd", "product", "act_fwd", *branch]
    first = "column_sum" if dtype is None else "scale"
    mlp = ["product", "act_bwd", "product", "product", "layernorm_bwd", "product"]
    assert backward == [first, *mlp, first, *ATTENTION_BACKWARD]


def test_layer_scale_costs_no_pass(count):
    """It is in the product's epilogue forward, and on the smaller weights backward."""
    forward, backward = count((9, 0), torch.bfloat16, layer_scale=True)
    assert forward == FORWARD
    on_weights = ("scale", "layer_scale_bwd")
    plain = ["scale", *MLP_BACKWARD, "scale", *ATTENTION_BACKWARD]
    assert sorted(backward) == sorted([*plain, *on_weights, *on_weights])


def test_passes_without_the_joint_gradient_are_seen(count, monkeypatch):
    """The count itself can fail: with the residual's gradient left to autograd there is a sum over tokens."""
    apart = fused.layernorm_linear
    monkeypatch.setattr(fused, "layernorm_linear", lambda *a, with_input, **k: (apart(*a, **k), a[0]))
    _, backward = count((9, 0), torch.bfloat16, layer_scale=False)
    assert backward == ["scale", *MLP_BACKWARD, "scale", *ATTENTION_BACKWARD, "add"]
