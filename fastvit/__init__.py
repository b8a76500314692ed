"""fastvit: a faster Vision Transformer to swap in, exact and proven.

>>> import timm, fastvit
>>> model = timm.create_model("vit_base_patch16_224", pretrained=True)
>>> fastvit.accelerate(model)         # in place: same parameters, same keys, same outputs
>>> print(fastvit.explain(model))     # which kernel runs each part, and why not where none does
>>> fastvit.restore(model)            # exactly as it was
"""

from . import ops, reference
from .accelerate import accelerate, explain, restore
from .attention_maps import attention_maps
from .checkpoints import load_checkpoint, save_checkpoint
from .dispatch import Unsupported, use_backend
from .model import VisionTransformer, create_model
from .packs import clear_pack_cache
from .parity import parity_report

__version__ = "0.1.0"

__all__ = [
    "Unsupported",
    "VisionTransformer",
    "__version__",
    "accelerate",
    "attention_maps",
    "clear_pack_cache",
    "create_model",
    "explain",
    "load_checkpoint",
    "ops",
    "parity_report",
    "reference",
    "restore",
    "save_checkpoint",
    "use_backend",
]
