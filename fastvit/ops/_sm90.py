"""Which products and attentions Hopper's own kernels take, and why not.

Other products are cuBLAS's with the passes of csrc/cuda, other attentions Triton's.

``torch.ops.fastvit_cuda.linear_act``, ``linear_residual`` and ``linear_act_grad`` (csrc/cuda/sm90) multiply and do
what follows in one kernel. They are compiled where setup.py found CUTLASS, and run on compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _tiles

MOST_KEYS, HEAD_DIMS, QUERIES = 272, (64, 80), 64  # of attention, see csrc/cuda/sm90/attention.h
BWD_KEYS, BWD_HEAD_DIM = range(65, 257), 64  # half a block would idle with fewer
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def device_facts(index: int) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors)"""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def why_not_built(ops: Any = torch.ops.fastvit_cuda, index: int | None = None) -> list[str]:
    """Reasons against every product on this device, whatever its operands."""
    if not hasattr(ops, "linear_act"):
        return ["Hopper's products are not in the CUDA library (built without CUTLASS or without 9.0a)"]
    if index is None and not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    capability = device_facts(index or 0)[0]
    if capability != (9, 0):
        return [f"the device has compute capability {capability[0]}.{capability[1]}, Hopper's products need 9.0"]
    return []


def why_not_attention(q: Tensor, keys: int, ops: Any = torch.ops.fastvit_cuda) -> list[str]:
    """Reasons against Hopper's attention of q (B, H, Nq, D) with this many keys. It takes any strides, or a copy."""
    reasons = why_not_built(ops, q.device.index or 0)
    if not reasons and not hasattr(ops, "attention_packed_fwd"):
        reasons.append("Hopper's attention is not in the CUDA library, which is older than the package")
    if q.dtype not in NAMES:
        reasons.append(f"q is {q.dtype}, Hopper's attention takes bfloat16 and float16")
    if q.shape[-1] not in HEAD_DIMS:
        taken = " and ".join(map(str, HEAD_DIMS))
        reasons.append(f"the head dim is {q.shape[-1]}, Hopper's attention takes {taken}")
    if keys > MOST_KEYS:
        reasons.append(f"there are {keys} keys, Hopper's attention takes up to {MOST_KEYS}")
    most = -(-keys // QUERIES) * QUERIES
    if q.shape[-2] > most:
        reasons.append(f"there are {q.shape[-2]} queries, Hopper's attention takes {most} beside {keys} keys")
    return reasons


def has_attention_bwd(q: Tensor, keys: int, ops: Any = torch.ops.fastvit_cuda) -> bool:
    """Whether there is a gradient of Hopper's attention here; else it is Triton's."""
    return q.shape[-1] == BWD_HEAD_DIM and keys in BWD_KEYS and hasattr(ops, "attention_bwd")


def for_tma(rows: Tensor) -> Tensor:
    """``rows`` with every row at a multiple of 16 bytes; a copy only where they are not."""
    steps = zip(rows.shape[:-1], rows.stride()[:-1], strict=True)
    suits = rows.stride(-1) == 1 and all(size == 1 or (step > 0 and step % 8 == 0) for size, step in steps)
    return rows if suits and rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def why_not(ops: Any, cols: int, residual: Tensor | None = None, **matrices: Tensor) -> list[str]:
    """Reasons why no product with ``cols`` outputs takes these matrices; the first one decides the dtype.

    ``residual`` may be float32 beside 16-bit operands, as autocast keeps the residual stream.
    """
    first_name, first = next(iter(matrices.items()))
    reasons = why_not_built(ops, first.device.index or 0)
    if first.dtype not in NAMES:
        reasons.append(f"{first_name} is {first.dtype}, Hopper's products take bfloat16 and float16")
    if cols % 8:
        reasons.append(f"the product has {cols} columns, Hopper's products take multiples of 8")
    for name, matrix in matrices.items():
        if matrix.dtype != first.dtype:
            reasons.append(f"{name} is {matrix.dtype}, {first_name} is {first.dtype}: Hopper's products take one dtype")
        else:
            reasons += _why_not_read(name, matrix)
    if residual is not None and residual.dtype not in (first.dtype, torch.float32):
        reasons.append(f"residual is {residual.dtype}, Hopper's products add to {first.dtype} or float32")
    elif residual is not None:
        reasons += _why_not_read("residual", residual)
    return reasons


def _why_not_read(name: str, matrix: Tensor) -> list[str]:
    rows, cols = matrix.shape
    if cols % 8 or cols == 0:
        return [f"{name} has {cols} columns, Hopper's products take multiples of 8"]
    stride = cols if rows == 1 else matrix.stride(0)  # that of a single row may be anything
    if matrix.stride(1) != 1 or stride * matrix.element_size() % 16 or matrix.data_ptr() % 16:
        return [f"{name}'s rows do not start at multiples of 16 bytes, as Hopper's products read them"]
    if stride < cols:
        return [f"{name}'s rows overlap, Hopper's products take a stride of {cols} or more"]
    return []


_MOST_KNOWN = 4096
_known: dict[tuple, Any] = {}


def takes(ops: Any, cols: int, residual: Tensor | None = None, **matrices: Tensor) -> bool:
    """Whether ``why_not`` has no reason."""

    def find() -> bool:
        return not why_not(ops, cols, residual, **matrices)

    return _remembered(find, ops, (cols, residual is None), *matrices.values(), residual)


def tile(
    ops: Any, op: str, rows: int, weight: Tensor, residual: Tensor | None = None, **matrices: Tensor
) -> str | None:
    """Name of the tile for ``rows`` rows times a weight (outputs, depth), None where ``why_not`` has a reason."""

    def find() -> str | None:
        if why_not(ops, weight.shape[0], residual, **matrices, weight=weight):
            return None
        multiprocessors = device_facts(weight.device.index or 0)[1]
        return _tiles.choose(op, NAMES[weight.dtype], rows, *weight.shape, multiprocessors)

    return _remembered(find, ops, (op, rows, residual is None), weight, *matrices.values(), residual)


def _remembered(find: Callable[[], Any], ops: Any, key: tuple, *tensors: Tensor | None) -> Any:
    """What ``find`` found for matrices of the same layouts."""
    layouts = [(t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors if t is not None]
    index = tensors[0].device.index or 0  # type: ignore[union-attr]
    key = (*key, hasattr(ops, "linear_act"), device_facts(index), index, *layouts)
    found = _known.get(key, _known)
    if found is _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[key] = find()
    return found
