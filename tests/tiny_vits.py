"""Tiny ViTs for the tests of accelerate, and the comparison that they share."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fastvit import accelerate, restore
from fastvit.testing import assert_as_accurate

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


def build(**overrides) -> nn.Module:
    """timm's VisionTransformer in a tiny size, every parameter far enough from zero to matter."""
    timm = pytest.importorskip("timm", reason="timm is not installed: nothing to compare with")
    cls = overrides.pop("cls", timm.models.vision_transformer.VisionTransformer)
    return scatter(cls(**(SIZES | overrides)))


def native(**overrides) -> nn.Module:
    """The same from fastvit."""
    from fastvit.model import VisionTransformer

    return scatter(VisionTransformer(**(SIZES | overrides)))


@contextmanager
def one_thread() -> Iterator[None]:
    """These models are too small for threads, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scatter(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and "embed" not in name and "token" not in name else 0.3
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(center + scale * torch.randn(p.shape, generator=generator))
    return model.eval()


class Mix(nn.Module):
    """An MLP that mixes tokens."""

    def forward(self, x):
        return x.mean(1, keepdim=True).expand_as(x)


def is_overridden(module):
    return "forward" in vars(module)


def images(batch=3, height=32, width=32, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5)).to(dtype)


def results(model, x, **kwargs):
    """The output and the gradient of the input and of every parameter."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(11)
    output = model(x, **kwargs)
    names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    grads = torch.autograd.grad((output * weights).sum(), [x, *params], allow_unused=True)
    return {"output": output.detach(), **dict(zip(["images", *names], grads, strict=True))}


def assert_same_results(model, x, backend="auto", **kwargs):
    """Accelerated ``model`` is as accurate as stock, in its output and in every gradient."""
    restore(model)
    eager = results(model, x, **kwargs)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in kwargs.items()}
    exact = results(copy.deepcopy(model).double(), x.double(), **wide)
    fused = results(accelerate(model, backend=backend), x, **kwargs)
    assert fused.keys() == eager.keys()
    together = ([], [], [])
    for name, value in fused.items():
        assert (value is None) == (eager[name] is None), f"{name}: a gradient here and none there"
        if value is not None:
            assert value.dtype == eager[name].dtype
            unit = exact[name].abs().max().clamp(min=1e-30)
            for values, part in zip(together, (value, eager[name], exact[name]), strict=True):
                values.append((part.double() / unit).flatten())
            # A tensor of five numbers on which stock was lucky proves nothing: one by one the gate is wider.
            assert_as_accurate(value, eager[name], exact[name], name, factor=6.0)
    fused, eager, exact = map(torch.cat, together)
    assert_as_accurate(fused.to(x.dtype), eager.to(x.dtype), exact, "output and gradients together")
