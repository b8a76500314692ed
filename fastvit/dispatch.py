"""Choose an implementation for each op, and be able to say why.

Three separate things: *support* (``Backend.why_not`` returns every reason it cannot run these arguments), *preference*
(the order of ``Op.backends``, without those that are ``only_by_name``) and the user's *choice* (``use_backend``,
``FASTVIT_BACKEND``). A chosen backend runs or raises ``Unsupported`` with its reasons; only "auto" moves on to the next
one, and says so once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "cuda", "cpp", "torch", "reference")
OPS: dict[str, Op] = {}

_MOST_SETTLED = 4096  # of one op, so that ever new shapes do not fill the memory

_choice: dict[str, str] = {}
_warned: set[tuple[str, str, str]] = set()
_record: list[tuple[str, str]] | None = None
_explained: dict[str, dict[str, list[str]]] | None = None


class Unsupported(RuntimeError):
    """A backend was asked for by name and cannot run these arguments. ``reasons`` lists why."""

    def __init__(self, op: str, backend: str, reasons: list[str]):
        super().__init__(f"{op}: backend {backend!r} cannot run this call: {'; '.join(reasons)}")
        self.op, self.backend, self.reasons = op, backend, reasons


def runs_anything(*args: Any, **kwargs: Any) -> list[str]:
    """``why_not`` of the plain PyTorch backends."""
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation. ``why_not`` and ``run`` take the op's own arguments."""

    name: str
    run: Callable[..., Tensor]
    why_not: Callable[..., list[str]] = runs_anything
    device_types: tuple[str, ...] = ()
    """Device types it is the preferred choice on; elsewhere its refusal is no news and is not warned about."""
    only_by_name: str = ""
    """Why "auto" passes it by even where it can run; empty where it does not."""


class Op:
    """A named op with its backends in order of preference."""

    def __init__(self, name: str, *backends: Backend):
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._settled: dict[tuple, Backend] = {}
        OPS[name] = self

    def __call__(self, first: Tensor, *args: Any, key: tuple | None = None, **kwargs: Any) -> Tensor:
        """Run the backend that ``select`` names. ``settled`` answers with it from now on to an equal ``key``."""
        if _explained is not None:
            _explained[self.name] = self.explain(first, *args, **kwargs)
        backend = self.select(first, *args, **kwargs)
        if _record is not None:
            _record.append((self.name, backend.name))
        if key is not None:
            self._settle(key, backend, first.device.type)
        return backend.run(first, *args, **kwargs)

    @property
    def choice(self) -> str:
        """The user's choice for this op: a backend's name, or "auto"."""
        return _choice.get(self.name, _choice.get("*", "auto")) if _choice else "auto"

    def settled(self, key: tuple | None) -> Callable[..., Tensor] | None:
        """What runs a call whose ``key``, all that checks and choice depend on, was seen before; else None."""
        if key is None or is_observed():
            return None
        backend = self._settled.get(key)
        return backend.run if backend is not None and self.backends.get(backend.name) is backend else None

    def _settle(self, key: tuple, backend: Backend, device_type: str) -> None:
        """Keep the choice, but not one that was worth a warning: the next call shall say so again."""
        before = takewhile(lambda other: other is not backend, self.backends.values())
        if self.choice == "auto" and any(device_type in other.device_types for other in before):
            return
        if len(self._settled) >= _MOST_SETTLED:
            self._settled.clear()
        self._settled[key] = backend

    def select(self, first: Tensor, *args: Any, **kwargs: Any) -> Backend:
        """The backend that will run this call. Raises ``Unsupported`` when the chosen one cannot."""
        chosen = self.choice
        if chosen != "auto":
            return self._chosen(chosen, first, *args, **kwargs)
        for backend in self.backends.values():
            if backend.only_by_name:
                continue
            reasons = backend.why_not(first, *args, **kwargs)
            if not reasons:
                return backend
            if first.device.type in backend.device_types and not torch.compiler.is_compiling():
                _warn_once(self.name, backend.name, reasons)
        raise Unsupported(self.name, "auto", ["no backend is left"])

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """For each backend, every reason it cannot run this call, or is not asked to; an empty list: it can."""
        return {
            name: backend.why_not(*args, **kwargs) + self._passed_by(backend) for name, backend in self.backends.items()
        }

    def _passed_by(self, backend: Backend) -> list[str]:
        if not backend.only_by_name or self.choice == backend.name:
            return []
        return [f"it runs only by name, as with use_backend({self.name}={backend.name!r}): {backend.only_by_name}"]

    def _chosen(self, name: str, *args: Any, **kwargs: Any) -> Backend:
        if name not in self.backends:
            raise Unsupported(self.name, name, [f"{self.name} has only {', '.join(self.backends)}"])
        reasons = self.backends[name].why_not(*args, **kwargs)
        if reasons:
            raise Unsupported(self.name, name, reasons)
        return self.backends[name]


def _warn_once(op: str, backend: str, reasons: list[str]) -> None:
    key = (op, backend, reasons[0])
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"fastvit.{op}: not using {backend!r}: {'; '.join(reasons)}", stacklevel=4)


def choices() -> tuple[tuple[str, str], ...]:
    """All of the user's choices, as a key."""
    return tuple(_choice.items())


def is_observed() -> bool:
    """Whether calls of ops are recorded or explained."""
    return _record is not None or _explained is not None


class use_backend:  # noqa: N801 - reads as a verb, like torch.no_grad
    """Force a backend, for all ops or op by op; process-wide, like ``torch.backends``.

    >>> use_backend("torch")                                   # from here on
    >>> with use_backend(attention="triton", layernorm_mlp="cuda"):
    ...     model(images)                                      # then back to what it was

    "auto" gives the choice back to the package. ``FASTVIT_BACKEND`` takes the same words:
    ``torch``, or ``attention=triton,layernorm_mlp=cuda``.
    """

    def __init__(self, backend: str | None = None, /, **per_op: str):
        wanted = ({"*": backend} if backend is not None else {}) | per_op
        for op, name in wanted.items():
            if name != "auto" and name not in BACKENDS:
                raise ValueError(f"use_backend: {name!r} is no backend, expected one of auto, {', '.join(BACKENDS)}")
            if op != "*" and OPS and op not in OPS:
                raise ValueError(f"use_backend: {op!r} is no op, expected one of {', '.join(OPS)}")
        self._before = dict(_choice)
        if backend is not None:
            _choice.clear()
        _choice.update(wanted)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _choice.clear()
        _choice.update(self._before)


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collect (op, backend) of every call inside, in order."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


@contextmanager
def explaining() -> Iterator[dict[str, dict[str, list[str]]]]:
    """Collect, for each op called inside, the reasons of every backend against its latest call."""
    global _explained
    before, _explained = _explained, {}
    try:
        yield _explained
    finally:
        _explained = before


def _choose_from_environment() -> None:
    words = [word for word in os.environ.get("FASTVIT_BACKEND", "").split(",") if word]
    per_op = dict(word.split("=", 1) for word in words if "=" in word)
    default = [word for word in words if "=" not in word]
    if len(default) > 1:
        raise ValueError(f"FASTVIT_BACKEND: {','.join(default)!r} names more than one default backend")
    use_backend(*default, **per_op)


_choose_from_environment()
