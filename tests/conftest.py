"""Shared by all tests: quiet refusals, repeatable numbers, and timm beside a CPU build of PyTorch."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def _make_torchvision_importable() -> torch.library.Library | None:
    """Declare two operators that a CUDA build of torchvision looks for when it is imported beside CPU PyTorch."""
    if importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _make_torchvision_importable()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed: nothing to compare with")
