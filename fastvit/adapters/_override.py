"""Stand in for one module's ``forward`` without touching its class, its parameters or its keys.

An ``Override`` is an attribute of the instance. It holds its module weakly, so that an accelerated model is freed like
any other, and follows deepcopy, pickle and DataParallel to the copy, which then runs on its own parameters.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dispatch import use_backend
from ..packs import unkept_packs


class Override:
    """``function(module, *args, **options, **kwargs)`` as an attribute of ``module``."""

    def __init__(self, module: nn.Module, function: Callable, options: dict[str, Any]):
        self._module = weakref.ref(module)
        self.function = function
        self.options = options

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise RuntimeError("the accelerated module is gone; a shallow copy of it needs fastvit.accelerate again")
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **self.options, **kwargs)

    @property
    def __wrapped__(self) -> Callable:
        """The class's own forward: what inspect.signature should see."""
        return type(self.module).forward.__get__(self.module)

    @property
    def __code__(self) -> CodeType:
        """torch.export names the file and line of a model's forward."""
        return type(self.module).forward.__code__

    def __reduce__(self) -> tuple:
        return Override, (self.module, self.function, self.options)

    def __deepcopy__(self, memo: dict) -> Override:
        module = self.module
        return Override(memo.get(id(module), module), self.function, copy.deepcopy(self.options, memo))


def override(
    module: nn.Module, host: Callable, backend: dict[str, str], options: dict[str, Any], keep_packs: bool = True
) -> None:
    """Run ``host(module, ..., **options)`` whenever ``module`` is called, with ``backend`` forced for its ops."""
    settings = {"host": host, "backend": backend, "options": options, "keep_packs": keep_packs}
    module.forward = Override(module, run, settings)  # type: ignore[method-assign]
    module._replicate_for_data_parallel = Override(module, _replicate, {})  # type: ignore[method-assign]
    module.__prepare_scriptable__ = Override(module, _stock_twin, {})  # type: ignore[assignment]


def release(module: nn.Module) -> None:
    """Take every override off ``module``."""
    for name in [name for name, value in module.__dict__.items() if isinstance(value, Override)]:
        delattr(module, name)


def overridden(module: nn.Module) -> Override | None:
    """The override that runs ``module``, if one does."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Override) and forward.module is module else None


def is_patched(module: nn.Module) -> bool:
    """Whether somebody else replaced ``module.forward`` on the instance."""
    return "forward" in module.__dict__ and overridden(module) is None


def stock_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class does."""
    return type(module).forward(module, *args, **kwargs)


def run(
    module: nn.Module,
    x: Any,
    *args: Any,
    host: Callable,
    backend: dict[str, str],
    options: dict[str, Any],
    keep_packs: bool = True,
    **kwargs: Any,
) -> Any:
    if needs_stock(x):
        return stock_forward(module, x, *args, **kwargs)
    if not backend and keep_packs:
        return host(module, x, *args, **options, **kwargs)
    with use_backend(**backend), nullcontext() if keep_packs else unkept_packs():
        return host(module, x, *args, **options, **kwargs)


def needs_stock(x: Any) -> bool:
    """Whether ``x`` has to be seen by every stock op: traced, transformed by torch.func, or a sharded tensor."""
    if type(x) is not Tensor and (not isinstance(x, Tensor) or hasattr(x, "__tensor_flatten__")):
        return True
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def _replicate(module: nn.Module) -> nn.Module:
    """A DataParallel replica whose overrides belong to the replica."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name, value in module.__dict__.items():
        if isinstance(value, Override):
            setattr(replica, name, Override(replica, value.function, value.options))
    return replica


def _stock_twin(module: nn.Module) -> nn.Module:
    """For torch.jit.script: the same module, sharing every tensor, without overrides."""
    tensors = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for part in twin.modules():
        release(part)
    return twin
