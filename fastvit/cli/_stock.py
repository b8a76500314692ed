"""The model that fastvit is compared with: timm's, or the same layers written with torch.nn alone."""

from __future__ import annotations

from torch import nn

from ..bench.stock import VisionTransformer


def stock_model(name: str, model: nn.Module, img_size: int) -> tuple[nn.Module, str]:
    """A headless stock model with ``model``'s weights, and what it is: "timm <version>" or "torch.nn"."""
    try:
        import timm
    except (ImportError, RuntimeError):  # timm imports torchvision, which may not fit this torch
        stock: nn.Module = VisionTransformer(model)
        kind = "torch.nn"
    else:
        stock = timm.create_model(name, pretrained=False, img_size=img_size, num_classes=0)
        kind = f"timm {timm.__version__}"
    stock.load_state_dict(model.state_dict())
    weight = next(model.parameters())
    return stock.to(weight.device, weight.dtype).train(model.training), kind
