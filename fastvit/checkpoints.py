"""Read, write and convert weights. Nothing is ever unpickled that could run code, and no file is left half written."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .foreign import CheckpointError, read_npz, read_onnx_encoder, some_of
from .resample import resample_pos_embed, square_grid

__all__ = ["CheckpointError", "Loaded", "convert_onnx", "load_checkpoint", "read_state_dict", "save_checkpoint"]

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike
_WRAPPERS = ("_orig_mod.", "module.")  # torch.compile and DistributedDataParallel put these before every key
_NESTED = ("state_dict", "model", "model_ema", "state_dict_ema")


class Loaded(NamedTuple):
    """What ``load_checkpoint`` left out: keys of the model not in the file, and keys of the file not in the model."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def read_state_dict(path: StrPath) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth``/``.pt``/``.bin``, JAX ``.npz`` or encoder ``.onnx`` file.

    A training checkpoint gives its "state_dict" or "model" entry, without the prefixes of torch.compile and DDP.
    Raises FileNotFoundError, or CheckpointError for a file that is truncated, foreign, or needs code to unpickle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": _read_safetensors,
        ".npz": read_npz,
        ".onnx": read_onnx_encoder,
    }
    state = readers.get(path.suffix.lower(), _read_pickle)(path)
    for name in _NESTED:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state dict, expected a non-empty dict of tensors")
    return _without_wrappers(state)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("safetensors is not installed, and checkpoints are read and written with it") from error
    return safetensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    library = _safetensors()
    try:
        return library.torch.load_file(path)
    except (library.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no readable safetensors file, or it is truncated ({error})") from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise CheckpointError(f"{path}: is no readable PyTorch file ({error})") from error
        raise CheckpointError(
            f"{path}: holds Python objects that only running its code could restore, which is refused; save its"
            f" state dict alone, or as safetensors ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a truncated zip, a text file: torch.load raises whatever its reader raised
        raise CheckpointError(f"{path}: is no readable PyTorch file, or it is truncated ({error})") from error


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def load_checkpoint(
    model: nn.Module, path: StrPath, strict: bool = True, *, resize_pos_embed: bool = True, new_head: bool = False
) -> Loaded:
    """Load a file into ``model``. All keys and shapes are checked before the first value is copied.

    strict            every key of the model is in the file and the other way round
    resize_pos_embed  resample a position table of another resolution (timm's way, and said in the log)
    new_head          leave the classifier as it is where the file's has another number of classes, or is missing
    returns           the keys left out, on either side

    Raises CheckpointError, naming file, key, shape and what was expected; the model is then as it was.
    """
    state = read_state_dict(path)
    return _load(model, state, str(path), strict=strict, resize_pos_embed=resize_pos_embed, new_head=new_head)


def load_npz(model: nn.Module, path: StrPath, prefix: str = "") -> Loaded:
    """Load a JAX ``.npz`` file; a classifier of another size is left as it is, as in timm."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    return _load(model, read_npz(path, prefix), str(path), strict=True, resize_pos_embed=True, new_head=True)


def _load(
    model: nn.Module, state: dict[str, Tensor], source: str, *, strict: bool, resize_pos_embed: bool, new_head: bool
) -> Loaded:
    own = model.state_dict()
    prefix = next((wrapper for wrapper in _WRAPPERS if own and all(key.startswith(wrapper) for key in own)), "")
    wanted = {key[len(prefix) :]: value for key, value in own.items()}
    if resize_pos_embed:
        state = _resize_pos_embed(model, state, wanted, source)
    if new_head:
        state, wanted = _without_head(state, wanted, source)
    missing, unexpected = check_fit(state, wanted, source, strict)
    fitting = {prefix + key: value for key, value in state.items() if key in wanted}
    model.load_state_dict(fitting, strict=False)
    return Loaded(missing, unexpected)


def check_fit(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str, strict: bool) -> Loaded:
    """Raise CheckpointError unless ``state`` can be copied into tensors like ``wanted``; return the keys left out."""
    problems = _misfits(state, wanted)
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if strict and missing:
        problems.append(f"missing: {some_of(missing)}")
    if strict and unexpected:
        problems.append(f"not in the model: {some_of(unexpected)}")
    if problems:
        raise CheckpointError(f"{source}: does not fit the model: {'; '.join(problems)}")
    return Loaded(missing, unexpected)


def _misfits(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    problems = []
    for key, value in state.items():
        if key not in wanted:
            continue
        expected = wanted[key]
        if value.shape != expected.shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
        elif value.is_floating_point() != expected.is_floating_point():
            problems.append(f"{key} is {value.dtype}, expected {expected.dtype}")
    more = len(problems) - 5
    return problems if more <= 0 else [*problems[:5], f"and {more} more keys do not fit"]


def _resize_pos_embed(
    model: Any, state: dict[str, Tensor], wanted: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """``state`` with its position table on the model's grid; unchanged when either has none."""
    table, own = state.get("pos_embed"), wanted.get("pos_embed")
    if table is None or own is None or table.shape == own.shape or table.dim() != 3 or own.dim() != 3:
        return state
    vit = getattr(model, "_orig_mod", getattr(model, "module", model))
    grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
    prefix = 0 if getattr(vit, "no_embed_class", False) else getattr(vit, "num_prefix_tokens", 1)
    old_grid = square_grid(table.shape[1] - prefix)
    if grid is None or table.shape[2] != own.shape[2]:
        return state
    if old_grid is None:
        raise CheckpointError(
            f"{source}: pos_embed has shape {tuple(table.shape)}, expected {tuple(own.shape)} or {prefix} prefix rows"
            " and a square grid to resample"
        )
    logger.info("%s: position table resampled from %s x %s to %s x %s patches", source, *old_grid, *grid)
    return {**state, "pos_embed": resample_pos_embed(table, grid, old_grid, prefix)}


def _without_head(
    state: dict[str, Tensor], wanted: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both without the classifier, unless it has the same shape on both sides."""
    here, there = ({k: v.shape for k, v in keys.items() if k.startswith("head.")} for keys in (wanted, state))
    if here == there:
        return state, wanted
    logger.warning("%s: the classifier does not fit, the model keeps its own", source)
    return (
        {key: value for key, value in state.items() if key not in there},
        {key: value for key, value in wanted.items() if key not in here},
    )


def save_checkpoint(model: nn.Module | dict[str, Tensor], path: StrPath) -> None:
    """Write the weights of ``model``, or a state dict: safetensors, or PyTorch's format for ``.pth``, ``.pt``, ``.bin``

    The file appears whole or not at all: it is written beside ``path`` and renamed.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    state = {key: value.detach().cpu().clone().contiguous() for key, value in _without_wrappers(dict(state)).items()}
    if Path(path).suffix.lower() in (".pth", ".pt", ".bin"):
        _write_whole(path, lambda part: torch.save(state, part))
    else:
        _write_whole(path, lambda part: _safetensors().torch.save_file(state, part, metadata={"format": "pt"}))


def _write_whole(path: StrPath, write: Callable[[str], None]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        write(part)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def convert_onnx(path: StrPath, out: StrPath, model: str = "vit_small_patch14_dinov2") -> dict[str, Tensor]:
    """Turn the encoder of an ONNX file into a safetensors file under timm's keys; return its tensors.

    path   a DINOv2-style encoder, its nodes named ``/backbone/...`` (anything else in the graph is left out)
    model  the variant whose keys and shapes the result must have, all of them and no others
    """
    from .model import create_model  # the model reads checkpoints, so it cannot be imported before them

    state = read_onnx_encoder(path)
    with torch.device("meta"):
        wanted = create_model(model, num_classes=0).state_dict()
    check_fit(state, wanted, str(path), strict=True)
    _write_whole(out, lambda part: _safetensors().torch.save_file(state, part, metadata={"format": "pt"}))
    return state
