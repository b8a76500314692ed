"""Normalisations and activations, by class and by timm's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = str | Callable[..., nn.Module] | None


class LayerNorm(nn.LayerNorm):
    """LayerNorm with a ViT's epsilon."""

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True, **kwargs: Any):
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **kwargs)


class LayerNormFp32(LayerNorm):
    """LayerNorm computed in float32 whatever the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RmsNorm(nn.Module):
    """Division by the root mean square. "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019)."""

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = True, device=None, dtype=None):
        super().__init__()
        self.normalized_shape = (channels,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype)) if affine else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_NORM_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": LayerNorm,
    "layernormfp32": LayerNormFp32,
    "rmsnorm": RmsNorm,
}
_ACT_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "prelu": nn.PReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hard_sigmoid": nn.Hardsigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
}


def get_norm_layer(norm_layer: Layer, argument: str = "norm_layer") -> Callable[..., nn.Module] | None:
    """A normalisation by name ("layernorm", "layernorm_fp32", "rmsnorm"); classes and partials pass through."""
    if not isinstance(norm_layer, str):
        return norm_layer
    name = norm_layer.replace("_", "").lower()
    return _by_name(_NORM_LAYERS, name, argument) if name else None


def get_act_layer(act_layer: Layer, argument: str = "act_layer") -> Callable[..., nn.Module] | None:
    """An activation by timm's name; classes and partials pass through."""
    if not isinstance(act_layer, str):
        return act_layer
    return _by_name(_ACT_LAYERS, act_layer.lower(), argument) if act_layer else None


def _by_name(layers: dict[str, Callable[..., nn.Module]], name: str, argument: str) -> Callable[..., nn.Module]:
    if name not in layers:
        raise ValueError(f"{argument} is {name!r}, expected a module class or one of {', '.join(layers)}")
    return layers[name]


def one_of(argument: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a ``value`` that is not ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
