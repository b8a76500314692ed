"""k nearest neighbours on frozen features: weighted votes of cosine similarities, as DINO evaluates its features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import data


def extract(model: nn.Module, images: Tensor, size: int, batch: int, advance: Callable[[int], None]) -> Tensor:
    """Unit features (B, E) of small uint8 pictures (B, 3, S, S), shown to ``model`` at ``size``."""
    weight = next(model.parameters())
    found = []
    with torch.inference_mode():
        for chunk in images.split(batch):
            pixels = data.normalize(data.resize(chunk, size).to(weight.device), weight.dtype)
            found.append(torch.nn.functional.normalize(model(pixels).float(), dim=-1).cpu())
            advance(len(chunk))
    return torch.cat(found)


def classify(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    """Classes of ``test`` (M,) and the indices of their neighbours in ``train`` (M, k), nearest first."""
    similarity, nearest = (test @ train.T).topk(min(k, len(train)), dim=-1)
    votes = torch.zeros(len(test), classes).scatter_add_(1, labels[nearest], (similarity / temperature).exp())
    return votes.argmax(dim=-1), nearest
