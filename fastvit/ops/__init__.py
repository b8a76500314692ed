"""The ops of a ViT, one file each. Every one is checked against its namesake in ``fastvit.reference``."""

from .attention import attention, attention_packed
from .attention_varlen import attention_varlen
from .layernorm_linear import layernorm_linear
from .layernorm_mlp import layernorm_mlp
from .linear_residual import linear_residual
from .patch_embed import patch_embed

__all__ = [
    "attention",
    "attention_packed",
    "attention_varlen",
    "layernorm_linear",
    "layernorm_mlp",
    "linear_residual",
    "patch_embed",
]
