"""What the four ops need of a block, read in one pass over its modules: this runs at every forward.

``read_block`` knows the plain case only, and answers None to anything else (a hook, a replaced forward, a parametrised
weight, an active dropout, one module more or less, another class); ``fused`` then looks closer, part by part. Nothing
is remembered of a block, so a change of it is seen by the next call. Of its classes it is: what they compute does not
change.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from .kinds import ACTIVATIONS, HEAD_NORMS, kind_of_type
from .reference import HeadNorm

_NORM, _LINEAR, _IDENTITY = ("LayerNorm",), ("Linear",), ("Identity",)
_DROPOUT, _SCALE, _DROP_PATH = ("Dropout", "Identity"), ("LayerScale", "Identity"), ("DropPath", "Identity")
_BLOCK = {
    "norm1": _NORM, "attn": ("Attention",), "ls1": _SCALE, "drop_path1": _DROP_PATH,
    "norm2": _NORM, "mlp": ("Mlp",), "ls2": _SCALE, "drop_path2": _DROP_PATH,
}  # fmt: skip
_ATTN = {
    "qkv": _LINEAR, "q_norm": ("Identity", *HEAD_NORMS), "k_norm": ("Identity", *HEAD_NORMS), "attn_drop": _DROPOUT,
    "norm": _IDENTITY, "proj": _LINEAR, "proj_drop": _DROPOUT,
}  # fmt: skip
_MLP = {
    "fc1": _LINEAR, "act": tuple(ACTIVATIONS), "drop1": _DROPOUT, "norm": _IDENTITY, "fc2": _LINEAR, "drop2": _DROPOUT,
}  # fmt: skip
_CHILDREN = (len(_BLOCK), len(_ATTN), len(_MLP))
# What is read from instances; a class that defines one of these itself (a parametrised one does) is not plain.
_READ = ("weight", "bias", "gamma", "eps", "p", "training", "num_heads", "scale", "fused_attn", "gate", "drop_prob")

_block_modules, _attn_modules, _mlp_modules = itemgetter(*_BLOCK), itemgetter(*_ATTN), itemgetter(*_MLP)


class BlockParts(NamedTuple):
    """Tensors and settings of a block that is nothing but the four ops."""

    norm1: tuple[Any, Any]
    """Weight and bias, as of every tuple here."""
    eps1: float
    qkv: tuple[Any, Any]
    heads: tuple[int, float, float]
    """num_heads, dropout_p, scale"""
    head_norms: dict[str, Any]
    proj: tuple[Any, Any]
    gamma1: Tensor | None
    drop_path1: nn.Module | None
    """None also where it drops nothing now."""
    mlp: tuple[Any, Any, Any, Any, Any, Any]
    """Of norm2, fc1 and fc2."""
    eps2: float
    act: str
    gamma2: Tensor | None
    drop_path2: nn.Module | None


class _Kinds(NamedTuple):
    """What is known of a block by the classes of its modules."""

    head_norm: str
    act: str
    scales: tuple[bool, bool]
    drop_paths: tuple[bool, bool]


_kinds_of_types: dict[tuple[type, ...], _Kinds | None] = {}


def read_block(block: Any) -> BlockParts | None:
    """What the ops read of ``block``; None where a module may want to be called, or is not as expected."""
    try:
        return _read(block)
    except (KeyError, AttributeError):  # a module, a parameter or a setting is not where it belongs
        return None


def _read(block: Any) -> BlockParts | None:
    children = block.__dict__["_modules"]
    modules = _block_modules(children)
    in_attn, in_mlp = modules[1].__dict__["_modules"], modules[5].__dict__["_modules"]
    modules = (*modules, *_attn_modules(in_attn), *_mlp_modules(in_mlp))
    kinds = _kinds((*map(type, modules), type(block)))
    owns = [module.__dict__ for module in modules]
    if kinds is None or (len(children), len(in_attn), len(in_mlp)) != _CHILDREN or _is_changed(owns):
        return None
    norm1, attn, ls1, drop_path1, norm2, _, ls2, drop_path2 = owns[:8]
    qkv, q_norm, k_norm, attn_drop, _, proj, proj_drop, fc1, act, drop1, _, fc2, drop2 = owns[8:]
    if attn.get("gate") is not None or not attn["fused_attn"] or _rate(proj_drop) or _rate(drop1) or _rate(drop2):
        return None
    head_norms = {}
    if kinds.head_norm:
        head_norms = {"q_norm": _head_norm(q_norm, kinds.head_norm), "k_norm": _head_norm(k_norm, kinds.head_norm)}
    return BlockParts(
        _norm(norm1),
        norm1["eps"],
        _linear(qkv),
        (attn["num_heads"], _rate(attn_drop), attn["scale"]),
        head_norms,
        _linear(proj),
        _plain(ls1["_parameters"]["gamma"]) if kinds.scales[0] else None,
        modules[3] if kinds.drop_paths[0] and drop_path1["training"] and drop_path1["drop_prob"] else None,
        (*_norm(norm2), *_linear(fc1), *_linear(fc2)),
        norm2["eps"],
        "gelu_tanh" if act.get("approximate") == "tanh" else kinds.act,
        _plain(ls2["_parameters"]["gamma"]) if kinds.scales[1] else None,
        modules[7] if kinds.drop_paths[1] and drop_path2["training"] and drop_path2["drop_prob"] else None,
    )


def _kinds(types: tuple[type, ...]) -> _Kinds | None:
    if types not in _kinds_of_types:
        _kinds_of_types[types] = _find_kinds(types)
    return _kinds_of_types[types]


def _find_kinds(types: tuple[type, ...]) -> _Kinds | None:
    expected = (*_BLOCK.values(), *_ATTN.values(), *_MLP.values(), ("Block",))
    kinds = [kind_of_type(kind) for kind in types]
    if not all(map(_keeps_access, types)) or any(kind not in k for kind, k in zip(kinds, expected, strict=True)):
        return None
    of = dict(zip((*_BLOCK, *_ATTN, *(f"mlp.{name}" for name in _MLP)), kinds, strict=False))
    if of["q_norm"] != of["k_norm"]:
        return None
    return _Kinds(
        "" if of["q_norm"] == "Identity" else of["q_norm"],
        ACTIVATIONS[of["mlp.act"]],
        (of["ls1"] == "LayerScale", of["ls2"] == "LayerScale"),
        (of["drop_path1"] == "DropPath", of["drop_path2"] == "DropPath"),
    )


def _keeps_access(kind: type) -> bool:
    """Whether an attribute of its instances is what ``__dict__``, ``_parameters`` and ``_modules`` hold."""
    own_access = kind.__getattribute__ is object.__getattribute__ and kind.__getattr__ is nn.Module.__getattr__  # type: ignore[attr-defined]
    return own_access and not any(name in vars(base) for base in kind.__mro__ for name in _READ)


def _is_changed(owns: list[dict[str, Any]]) -> bool:
    """Whether a hook wants to see a module's call, or its forward was replaced on the instance."""
    for own in owns:  # a generator would take longer
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        if "forward" in own:
            return True
    return False


def _plain(tensor: Any) -> Tensor | None:
    if tensor is not None and type(tensor) not in (nn.Parameter, Tensor):
        raise AttributeError("not a plain tensor")
    return tensor


def _linear(own: dict[str, Any]) -> tuple[Any, Any]:
    parameters = own["_parameters"]
    if own["_modules"]:  # an adapter, a parametrisation
        raise AttributeError("not a plain module")
    return _plain(parameters["weight"]), _plain(parameters["bias"])


def _norm(own: dict[str, Any]) -> tuple[Any, Any]:
    if len(own["normalized_shape"]) != 1 or own.get("_fast_norm"):
        raise AttributeError("not a plain LayerNorm")
    return _linear(own)


def _head_norm(own: dict[str, Any], kind: str) -> HeadNorm:
    if len(own["normalized_shape"]) != 1 or own.get("_fast_norm") or own["_modules"]:
        raise AttributeError("not a plain norm")
    parameters = own["_parameters"]
    return HeadNorm(_plain(parameters["weight"]), _plain(parameters.get("bias")), own["eps"], kind == "RmsNorm")


def _rate(own: dict[str, Any]) -> float:
    """What a Dropout drops now; 0 for an Identity."""
    return own["p"] if "p" in own and own["training"] else 0.0


def row_scale(drop_path: Any, x: Tensor) -> Tensor | None:
    """One factor a sample (B,), drawn for a DropPath that is at work."""
    if drop_path is None:
        return None
    keep_prob = 1.0 - drop_path.drop_prob
    row_scale = x.new_empty(x.shape[0]).bernoulli_(keep_prob)
    if keep_prob > 0.0 and drop_path.scale_by_keep:
        row_scale.div_(keep_prob)
    return row_scale
