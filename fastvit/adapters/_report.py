"""The report of ``fastvit.explain``: which kernel runs each part, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .. import packs
from ..dispatch import OPS, Unsupported, use_backend
from ..fused import activation_name, head_norms, why_not_fused, why_not_skip
from . import _vit, find_adapter
from ._override import overridden

CLASS_TOKEN = "class token only"
STOCK, PARTS = "stock", "parts"


@dataclass(frozen=True)
class Row:
    """One part of one module."""

    module: str
    """Its name in the model, such as "blocks.0"."""
    part: str
    """The op that stands for it, or "class token only"."""
    fused: bool
    backend: str
    """What runs it: a backend's name; "stock" where the modules themselves do, "parts" where smaller ops do."""
    reasons: list[str] = field(default_factory=list)
    """Why it is not fused; empty when it is."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """For each backend that cannot run it: why."""
    note: str = ""
    pack_bytes: int = 0
    """Memory that packed copies of its weights take now, on a CPU."""


@dataclass(frozen=True)
class Report:
    """Rows for programs, a table for people."""

    model: str
    rows: list[Row]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.model]
        if self.rows:
            lines.append(f"{'module':<24}{'part':<20}{'runs on':<10}why")
        for alike, group in groupby(self.in_order(), key=lambda row: (row.part, row.backend, _why(row))):
            names = [row.module for row in group]
            shown = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1].rpartition('.')[2]}"
            part, backend, why = alike
            first, *more = why or [""]
            lines.append(f"{shown or '(model)':<24}{part:<20}{backend:<10}{first}".rstrip())
            lines += [f"{'':<54}{reason}" for reason in more]
        return "\n".join([*lines, self.note] if self.note else lines)

    def in_order(self) -> list[Row]:
        """Rows part by part, so that the same part of successive blocks stands together."""
        parts = list(dict.fromkeys(row.part for row in self.rows))
        return sorted(self.rows, key=lambda row: parts.index(row.part))


def _why(row: Row) -> list[str]:
    refused = [f"{name}: {'; '.join(reasons)}" for name, reasons in row.refused.items()]
    packed = [f"packed weights: {_megabytes(row.pack_bytes)}"] if row.pack_bytes else []
    return [*row.reasons, *([row.note] if row.note else []), *packed, *(refused if row.fused else [])]


def report(model: nn.Module) -> Report:
    rows = list(_rows(model))
    unknown = f"nothing here is known to fastvit: {type(model).__qualname__} holds no ViT of timm's or fastvit's"
    note = _pack_note(rows) if rows else unknown
    return Report(f"{type(model).__qualname__}, {'training' if model.training else 'eval'} mode", rows, note)


def _pack_note(rows: list[Row]) -> str:
    own, everything = sum(row.pack_bytes for row in rows), packs.pack_bytes()
    if not everything:
        return ""
    return f"packed weights kept: {_megabytes(own)} of this model, {_megabytes(everything)} in all"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"


def _rows(model: nn.Module) -> Iterator[Row]:
    for name, module in model.named_modules():
        adapter = find_adapter(module)
        if adapter is None:
            continue
        left_alone = adapter.why_not(module)
        if not left_alone and not adapter.is_fast and overridden(module) is None:
            left_alone = ["not accelerated"]
        if adapter.part == "block":
            yield from _block_rows(name, module, left_alone)
        else:
            yield from _model_rows(name, module, left_alone)


def _model_rows(name: str, vit: Any, left_alone: list[str]) -> Iterator[Row]:
    whole = left_alone or _vit.why_not_whole(vit)
    reasons = whole or _vit.why_not_embed(vit)
    yield _row(name, "patch_embed", reasons, vit)
    override = overridden(vit)
    wanted = vit.cls_only_last_block if override is None and not left_alone else True
    if override is not None:
        wanted = override.options["options"]["cls_only_last_block"]
    reasons = whole or ([] if wanted else ["cls_only_last_block is False"]) or _vit.why_not_class_token_only(vit)
    note = "" if reasons else "the head reads nothing else"
    yield Row(name, CLASS_TOKEN, not reasons, "" if not reasons else STOCK, reasons, note=note)
    for index, block in enumerate(vit.blocks):
        if find_adapter(block) is None:
            reason = f"{type(block).__qualname__} is not a block that fastvit knows"
            yield Row(f"{name}.blocks.{index}".lstrip("."), "block", False, STOCK, [reason])


def _block_rows(name: str, block: Any, left_alone: list[str]) -> Iterator[Row]:
    if left_alone:
        yield from (Row(name, op, False, STOCK, left_alone) for op in _MODULES)
        return
    by_op: dict[str, list[str]] = {op: [] for op in _MODULES}
    for reason in why_not_fused(block):
        for op in _ops_of(reason):
            by_op[op].append(reason)
    yield _row(name, "layernorm_linear", by_op["layernorm_linear"], block)
    yield _attention_row(name, block, by_op["attention_packed"])
    yield _row(name, "linear_residual", by_op["linear_residual"], block)
    in_parts = by_op["layernorm_mlp"] and not why_not_skip(block.mlp, "mlp", "Mlp", "GluMlp")
    yield _row(name, "layernorm_mlp", by_op["layernorm_mlp"], block, instead=PARTS if in_parts else STOCK)


def _attention_row(name: str, block: Any, reasons: list[str]) -> Row:
    """A module between projection and kernel is called there; before the kernel it parts q, k and v."""
    around = [reason for reason in reasons if _subject(reason).startswith(_MODULES["attention_packed"])]
    before = any(not _subject(reason).startswith("attn.norm") for reason in around)
    other = [reason for reason in reasons if reason not in around]
    if not before and not other and head_norms(block.attn):
        around.append("with attn.q_norm and attn.k_norm")
    return _row(name, "attention" if before else "attention_packed", other, block, note="; ".join(around))


def _row(name: str, op: str, reasons: list[str], module: Any, note: str = "", instead: str = STOCK) -> Row:
    if reasons:
        return Row(name, op, False, instead, reasons, note=note)
    override, arguments = overridden(module), _ARGUMENTS[op](module)
    with use_backend(**(override.options["backend"] if override else {})):
        refused = {backend: why for backend, why in OPS[op].explain(*arguments).items() if why}
        try:
            backend = OPS[op].select(*arguments).name
            packed = packs.pack_bytes([module.get_parameter(f"{path}.weight") for path in _PACKED.get(op, ())])
            return Row(name, op, True, backend, refused=refused, note=note, pack_bytes=packed)
        except Unsupported as error:
            return Row(name, op, False, "", [str(error)], refused, note)


# Which op stands for which modules of a block: a reason of why_not_fused begins with the name of one of them.
_MODULES = {
    "layernorm_linear": ("norm1", "attn.qkv"),
    "attention_packed": ("attn.q_norm", "attn.k_norm", "attn.norm"),
    "linear_residual": ("attn.proj", "attn.proj_drop", "ls1", "drop_path1"),
    "layernorm_mlp": ("norm2", "mlp", "ls2", "drop_path2"),
}


# The modules whose weights an op packs on a CPU.
_PACKED = {
    "patch_embed": ("patch_embed.proj",),
    "layernorm_linear": ("attn.qkv",),
    "linear_residual": ("attn.proj",),
    "layernorm_mlp": ("mlp.fc1", "mlp.fc2"),
}


def _ops_of(reason: str) -> list[str]:
    """The ops that ``reason`` is about; all of attention's for "attn" itself, all four for the block."""
    subject = _subject(reason)
    named = [op for op, names in _MODULES.items() for name in names if f"{subject}.".startswith(f"{name}.")]
    if named:
        return named[:1]
    return [op for op in _MODULES if op != "layernorm_mlp"] if subject.startswith("attn") else list(_MODULES)


def _subject(reason: str) -> str:
    """The module that ``reason`` begins with."""
    return reason.split(" ", 1)[0]


def _tokens(weight: Tensor, width: int) -> Tensor:
    return weight.new_empty(1, 2, width, dtype=_dtype(weight))


def _dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _norm_linear_arguments(block: Any) -> tuple:
    norm, qkv = block.norm1, block.attn.qkv
    return _tokens(qkv.weight, qkv.in_features), norm.weight, norm.bias, *_linear(qkv), norm.eps


def _packed_arguments(block: Any) -> tuple:
    attn = block.attn
    like = next(block.parameters())  # qkv may be anything that gives packed tokens
    qkv, norms = _tokens(like, 3 * attn.num_heads * attn.head_dim), head_norms(attn)
    return qkv, attn.num_heads, _dropout_p(attn), attn.scale, norms.get("q_norm"), norms.get("k_norm")


def _attention_arguments(block: Any) -> tuple:
    attn = block.attn
    like = next(block.parameters())
    q = like.new_empty(1, attn.num_heads, 2, attn.head_dim, dtype=_dtype(like))
    return q, q, q, None, False, _dropout_p(attn), attn.scale


def _dropout_p(attn: Any) -> float:
    return getattr(attn.attn_drop, "p", 0.0) if attn.attn_drop.training else 0.0


def _project_arguments(block: Any) -> tuple:
    proj = block.attn.proj
    x, residual = _tokens(proj.weight, proj.in_features), _tokens(proj.weight, proj.out_features)
    return x, *_linear(proj), residual, getattr(block.ls1, "gamma", None), None


def _mlp_arguments(block: Any) -> tuple:
    norm, mlp = block.norm2, block.mlp
    x = _tokens(mlp.fc1.weight, mlp.fc1.in_features)
    gamma = getattr(block.ls2, "gamma", None)
    weights = (norm.weight, norm.bias, *_linear(mlp.fc1), *_linear(mlp.fc2))
    return x, *weights, gamma, None, activation_name(mlp.act), norm.eps, True


def _embed_arguments(vit: Any) -> tuple:
    proj = vit.patch_embed.proj
    images = proj.weight.new_empty(1, *proj.weight.shape[1:], dtype=_dtype(proj.weight))
    return images, *_linear(proj), None, None, None, None


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    dtype = _dtype(module.weight)
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)


_ARGUMENTS = {
    "patch_embed": _embed_arguments,
    "layernorm_linear": _norm_linear_arguments,
    "attention": _attention_arguments,
    "attention_packed": _packed_arguments,
    "linear_residual": _project_arguments,
    "layernorm_mlp": _mlp_arguments,
}
