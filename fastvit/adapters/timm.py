"""timm: ``VisionTransformer`` (and DeiT's distilled one), and its ``Block`` wherever another model uses it."""

from ..fused import block_forward
from ._adapter import Adapter
from ._vit import vision_transformer_forward

_HOME = "timm.models.vision_transformer"

ADAPTERS = {
    (_HOME, "Block.forward"): Adapter("block", block_forward),
    (_HOME, "VisionTransformer.forward"): Adapter("model", vision_transformer_forward),
}
