"""What is done to a model after it was accelerated: hooks, LoRA, parametrisations, new weights, other modes."""

import copy

import pytest
import torch
from tiny_vits import Mix, build, images, is_overridden, one_thread, results
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastvit import accelerate, explain, restore


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def test_every_hook_is_called():
    """A hook on any one module sees what it sees in stock timm, in shape and value, as often."""
    model, x = build(init_values=0.5), images()
    for name, module in list(model.named_modules()):
        seen = []
        handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        stock = restore(model)(x)
        fused = accelerate(model)(x)
        handle.remove()
        count = len(seen) // 2
        assert len(seen) == 2 * count, f"{name}: {len(seen)} calls"
        for before, after in zip(seen[:count], seen[count:], strict=True):
            torch.testing.assert_close(after, before, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(fused, stock)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.norm1", "blocks.1.mlp.act", "blocks.0.attn.qkv", "norm", ""])
def test_other_hooks_are_called(name):
    model, calls = accelerate(build()), []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append(grad_out[0].shape))
    model(images()).sum().backward()
    fused = calls[:]
    calls.clear()
    restore(model)(images()).sum().backward()
    assert calls == fused
    assert len(calls) == 2


def test_global_hooks_are_called():
    model, counts = accelerate(build()), []
    for _ in range(2):
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: counts[-1].append(type(m)))
        counts.append([])
        model(images())
        handle.remove()
        restore(model)
    assert counts[0] == counts[1]


class LoRA(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.down, self.up = nn.Linear(linear.in_features, 4, bias=False), nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_lora(path):
    model = accelerate(build(init_values=0.5))
    for block in model.blocks:
        parent, name = block.get_submodule(path.split(".")[0]), path.split(".")[1]
        block.requires_grad_(False)
        setattr(parent, name, LoRA(getattr(parent, name)))
    overrides = [is_overridden(block) for block in model.blocks]
    fused = results(model, images())
    assert all(overrides)
    assert any("LoRA" in reason for row in explain(model).rows for reason in row.reasons)
    stock = results(restore(model), images())
    for name, value in stock.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)


def _double_weight(module, name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, name, Double())


CHANGES = {
    "parametrised qkv": lambda m: _double_weight(m.blocks[1].attn.qkv, "weight"),
    "parametrised fc1 bias": lambda m: _double_weight(m.blocks[0].mlp.fc1, "bias"),
    "parametrised norm": lambda m: _double_weight(m.blocks[1].norm1, "weight"),
    "parametrised layer scale": lambda m: _double_weight(m.blocks[0].ls2, "gamma"),
    "parametrised patches": lambda m: _double_weight(m.patch_embed.proj, "weight"),
    "parametrised positions": lambda m: _double_weight(m, "pos_embed"),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.blocks[0].mlp.fc2),
    "weight norm": lambda m: parametrizations.weight_norm(m.blocks[1].attn.proj),
    "old weight norm": lambda m: nn.utils.weight_norm(m.blocks[1].attn.proj),
    "pruning": lambda m: prune.l1_unstructured(m.blocks[0].mlp.fc1, "weight", 0.5),
    "no fused attention": lambda m: setattr(m.blocks[1].attn, "fused_attn", False),
    "another norm": lambda m: setattr(m, "norm", nn.Identity()),
    "another activation": lambda m: setattr(m.blocks[0].mlp, "act", nn.Tanh()),
    "no last block": lambda m: m.prune_intermediate_layers([0], prune_head=False),
    "patched forward": lambda m: setattr(m.blocks[1], "forward", lambda x: 2 * x),
    "patched norm": lambda m: setattr(m.blocks[1].norm2, "forward", lambda x: 2 * x),
    "patched head": lambda m: setattr(m, "pool", lambda x, pool_type=None: x.mean(1)),
    "patched positions": lambda m: setattr(
        m, "_pos_embed", lambda x: torch.cat([m.cls_token.expand(x.shape[0], -1, -1), 2 * x], 1)
    ),
    "patched features": lambda m: setattr(m, "forward_features", lambda x, **kwargs: m._pos_embed(m.patch_embed(x))),
    "token mixing mlp": lambda m: setattr(m.blocks[1], "mlp", Mix()),
    "new head": lambda m: m.reset_classifier(7, "avg"),
    "new size": lambda m: m.set_input_size((48, 48)),
    "new patch": lambda m: m.set_input_size(patch_size=(16, 16)),
    "checkpointing": lambda m: m.set_grad_checkpointing(),
    "frozen": lambda m: m.blocks.requires_grad_(False),
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "training": lambda m: m.train(),
    "in place": lambda m: m.blocks[0].mlp.fc1.weight.data.mul_(2),
    "new parameter": lambda m: setattr(m.blocks[0].attn.qkv, "weight", nn.Parameter(torch.randn(192, 64))),
    "loaded": lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_after_accelerate(change):
    """The same change to stock and to an accelerated model: the same results."""
    torch.manual_seed(2)
    stock = build(init_values=0.5)
    fused = accelerate(copy.deepcopy(stock))
    fused(images())
    for model in (stock, fused):
        torch.manual_seed(4)
        CHANGES[change](model)
    assert is_overridden(fused)
    side = 48 if change == "new size" else 32
    x = images(3, side, side, next(stock.parameters()).dtype)
    before, after = results(stock, x), results(fused, x)
    assert before.keys() == after.keys()
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 1e-9}[x.dtype]
    for name, value in before.items():
        scale = 0.0 if value is None else value.abs().max().item()
        torch.testing.assert_close(after[name], value, rtol=tolerance, atol=tolerance * (scale + 1e-6), msg=name)


def test_attention_maps_by_hook():
    """With fused_attn off, a hook on attn_drop sees the attention weights of every block, as in timm."""
    model, maps = accelerate(build()), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    model(images())
    assert [m.shape for m in maps] == [(3, 2, 17, 17)] * 2
    torch.testing.assert_close(torch.stack(maps).sum(-1), torch.ones(2, 3, 2, 17))


def test_optimiser_steps():
    """Weights change under the accelerated model: three steps end where stock's end."""
    ends = []
    for prepare in (lambda m: m, accelerate):
        model = prepare(build(init_values=0.5)).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            loss = model(images()).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                model.eval()(images())
            model.train()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
