"""What a module computes, known by the function that runs it, and whether somebody watches it."""

from __future__ import annotations

from torch import nn

_TIMM_VIT = "timm.models.vision_transformer"
_OURS = "fastvit.layers"

# A module is known by the function that runs it, so a subclass that keeps its parent's forward is known too.
_HOMES = {
    "Identity": ("torch.nn.modules.linear",),
    "Linear": ("torch.nn.modules.linear",),
    "Conv2d": ("torch.nn.modules.conv",),
    "LayerNorm": ("torch.nn.modules.normalization", "timm.layers.norm"),
    "Dropout": ("torch.nn.modules.dropout",),
    "GELU": ("torch.nn.modules.activation", "timm.layers.activations"),
    "GELUTanh": ("timm.layers.activations",),
    "QuickGELU": ("fastvit.norm_act", "timm.layers.activations"),
    "LayerScale": (_OURS, "timm.layers.layer_scale", _TIMM_VIT),
    "DropPath": (_OURS, "timm.layers.drop"),
    "Attention": (_OURS, "timm.layers.attention", _TIMM_VIT),
    "Mlp": (_OURS, "timm.layers.mlp"),
    "GluMlp": (_OURS, "timm.layers.mlp"),
    "SwiGLU": (_OURS, "timm.layers.mlp"),
    "LayerNormFp32": ("fastvit.norm_act", "timm.layers.norm"),
    "RmsNorm": ("fastvit.norm_act", "timm.layers.norm"),
    "PatchEmbed": (_OURS, "timm.layers.patch_embed"),
    "Block": (_OURS, _TIMM_VIT),
}
for _name in ("ELU", "Hardsigmoid", "Hardswish", "LeakyReLU", "Mish", "ReLU", "SELU", "SiLU", "Sigmoid", "Tanh"):
    _HOMES[_name] = ("torch.nn.modules.activation",)
_KINDS = {(home, f"{kind}.forward"): kind for kind, homes in _HOMES.items() for home in homes}
_KIND_OF_TYPE: dict[type, str] = {}
HEAD_NORMS = ("LayerNorm", "LayerNormFp32", "RmsNorm")
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def kind_of(module: nn.Module | None) -> str:
    """What ``module`` computes, as one of the names above; "" when that is unknown. None counts as Identity.

    Of the named kinds only Attention, Block and PatchEmbed mix tokens.
    """
    return "Identity" if module is None else kind_of_type(type(module))


def kind_of_type(module_type: type) -> str:
    kind = _KIND_OF_TYPE.get(module_type)
    if kind is None:
        forward = module_type.forward  # type: ignore[attr-defined]
        kind = _KIND_OF_TYPE[module_type] = _KINDS.get((forward.__module__, forward.__qualname__), "")
    return kind


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler along with fastvit.
kind_of_type._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_watched(module: nn.Module) -> bool:
    """Whether a hook wants to see the calls of ``module``."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )
