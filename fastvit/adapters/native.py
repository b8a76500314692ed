"""fastvit's own ``VisionTransformer`` and ``Block``, which run on the fused ops by themselves."""

from typing import Any

from torch import Tensor

from ..fused import block_forward
from ._adapter import Adapter
from ._override import stock_forward


def vision_transformer_forward(vit: Any, x: Tensor, *args: Any, cls_only_last_block: bool, **kwargs: Any) -> Tensor:
    """The model's own forward, in which ``vit.cls_only_last_block`` must agree as well."""
    if cls_only_last_block:
        return stock_forward(vit, x, *args, **kwargs)
    return vit.forward_head(vit.forward_features(x, *args, **kwargs))


ADAPTERS = {
    ("fastvit.layers", "Block.forward"): Adapter("block", block_forward, (), is_fast=True),
    ("fastvit.model", "VisionTransformer.forward"): Adapter("model", vision_transformer_forward, (), is_fast=True),
}
