"""timm: ``VisionTransformer`` (and DeiT's distilled one), and its ``Block`` wherever another model uses it."""

from ..fused import block_forward
from ._adapter import Adapter
from ._vit import vision_transformer_forward

_HOME = "timm.models.vision_transformer"
_BLOCK = ("attn.qkv", "attn.q_norm", "attn.k_norm", "attn.attn_drop", "attn.scale", "mlp", "ls1", "drop_path1", "ls2")
_MODEL = ("pool", "patch_drop", "norm_pre", "reg_token", "attn_pool", "no_embed_class", "dynamic_img_size", "blocks")

ADAPTERS = {
    (_HOME, "Block.forward"): Adapter("block", block_forward, _BLOCK),
    (_HOME, "VisionTransformer.forward"): Adapter("model", vision_transformer_forward, _MODEL),
}
