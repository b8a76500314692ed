"""A ViT's initial weights, scheme by scheme; the same random numbers as timm from the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MODES = ("", "jax", "jax_nlhb", "moco", "reset")


def init_weights(model: nn.Module, mode: str, head_bias: float, needs_reset: bool) -> None:
    """Initialise every module under ``model``, children before parents.

    mode         "" (truncated normal), "jax", "jax_nlhb" (head bias given), "moco" or "reset" (each module's own)
    needs_reset  also call reset_parameters, for modules that did not just initialise themselves
    """
    schemes: dict[str, Callable[[nn.Module, str], bool]] = {
        "": _truncated_normal,
        "jax": partial(_jax, head_bias=head_bias),
        "jax_nlhb": partial(_jax, head_bias=head_bias),
        "moco": _moco,
        "reset": lambda module, name: False,
    }
    for name, module in _children_first(model):
        if schemes[mode](module, name):
            continue
        if mode != "reset" and hasattr(module, "init_weights"):
            module.init_weights()
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _children_first(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from _children_first(child, path)
        yield path, child


def truncated_normal_(tensor: Tensor, std: float = 1.0, limit: float = 2.0) -> Tensor:
    """Fill with a normal distribution cut off at ``limit``, by the inverse of its cumulative distribution."""
    share = math.erf(limit / (std * math.sqrt(2.0)))
    with torch.no_grad():
        return tensor.uniform_(-share, share).erfinv_().mul_(std * math.sqrt(2.0)).clamp_(-limit, limit)


def _truncated_normal(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    truncated_normal_(module.weight, std=0.02)
    _zero_bias(module)
    return True


def _jax(module: nn.Module, name: str, head_bias: float) -> bool:
    if isinstance(module, nn.Linear) and name.startswith("head"):
        nn.init.zeros_(module.weight)
        nn.init.constant_(module.bias, head_bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None and "mlp" in name:
            nn.init.normal_(module.bias, std=1e-6)
        else:
            _zero_bias(module)
    elif isinstance(module, nn.Conv2d):
        _lecun_normal(module.weight)
        _zero_bias(module)
    else:
        return False
    return True


def _moco(module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    if "qkv" in name:  # three matrices in one, each with its own fan-out
        bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        nn.init.xavier_uniform_(module.weight)
    _zero_bias(module)
    return True


def _lecun_normal(weight: Tensor) -> None:
    """Truncated at two standard deviations, which 0.8796 puts back to unit variance."""
    fan_in = weight[0].numel()
    with torch.no_grad():
        truncated_normal_(weight).mul_(fan_in**-0.5 / 0.87962566103423978)


def _zero_bias(module: nn.Linear | nn.Conv2d) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
