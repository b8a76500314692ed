"""Make a model that is already there faster, say how, and put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from .adapters import Adapter, find_adapter
from .adapters._override import override, release
from .adapters._report import Report, report
from .dispatch import BACKENDS, OPS
from .ops.layernorm_mlp import MEMORY


def accelerate(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str | Mapping[str, str] = "auto",
    cls_only_last_block: bool = True,
    memory: str = "default",
    keep_packs: bool = True,
) -> nn.Module:
    """Run every ViT in ``model`` on the fused ops. In place: same classes, parameters, keys, outputs and gradients.

    filter_fn            (module, name) -> bool: which transformer blocks and whole ViTs to accelerate; default all
    backend              forced for this model's ops, for all ("torch") or op by op ({"attention": "triton"})
    cls_only_last_block  run the last block for the class token alone where the head reads nothing else
    memory               "default" | "lean": keep fc1's result of each block for the backward, or compute it again
    keep_packs           on a CPU: keep a packed copy of each weight between calls (``explain`` says how much memory
                         they take), or pack at each call
    returns              ``model``

    Hooks, LoRA, parametrisations, dropout and moves are looked at on each call: what a fused op would leave out is
    run by the modules themselves. ``explain`` says what is. Calling it again replaces the former choices. A forced
    backend holds for the process while the model's forward runs: do not run such a model beside another in threads.

    Raises TypeError or ValueError for what cannot be accelerated at all.
    """
    _check_model("accelerate", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"accelerate: model is a {type(model).__name__}, expected it before torch.jit.script or trace")
    if memory not in MEMORY:
        raise ValueError(f"accelerate: memory is {memory!r}, available: {', '.join(map(repr, MEMORY))}")
    forced = _forced_backends(backend)
    restore(model)
    for name, module, adapter in list(_supported(model)):
        if filter_fn is not None and not filter_fn(module, name):
            continue
        options = {"memory": memory} if adapter.part == "block" else {"cls_only_last_block": cls_only_last_block}
        usual = not forced and keep_packs and options in ({"memory": "default"}, {"cls_only_last_block": True})
        if not (adapter.is_fast and usual):
            override(module, adapter.forward, forced, options, keep_packs)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``, in place: the model is exactly as it was. Does nothing to any other model."""
    _check_model("restore", model)
    for module in model.modules():
        release(module)
    return model


def explain(model: nn.Module) -> Report:
    """Which kernel runs each part of ``model`` in its present mode, dtype and place, and why not where none does.

    ``print(explain(model))`` shows a table; ``explain(model).rows`` holds the same for programs. Nothing is run.
    """
    _check_model("explain", model)
    return report(model)


def _check_model(caller: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model is a {type(model).__name__}, expected a torch.nn.Module")


def _supported(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    for name, module in model.named_modules():
        adapter = find_adapter(module)
        if adapter is not None and not adapter.why_not(module):
            yield name, module, adapter


def _forced_backends(backend: str | Mapping[str, str]) -> dict[str, str]:
    """The backend for each op that is forced to one."""
    if not isinstance(backend, (str, Mapping)):
        raise TypeError(f"accelerate: backend is a {type(backend).__name__}, expected a name or a dict op -> name")
    wanted = dict.fromkeys(OPS, backend) if isinstance(backend, str) else dict(backend)
    wanted = {op: name for op, name in wanted.items() if name != "auto"}
    for op, name in wanted.items():
        if op not in OPS:
            raise ValueError(f"accelerate: backend names the op {op!r}, expected one of {', '.join(OPS)}")
        if name not in BACKENDS:
            raise ValueError(f"accelerate: backend is {name!r}, expected one of auto, {', '.join(BACKENDS)}")
    missing = [op for op, name in wanted.items() if name not in OPS[op].backends]
    if missing:
        have = [op for op in OPS if backend in OPS[op].backends] if isinstance(backend, str) else []
        hint = f"; name it op by op: backend={dict.fromkeys(have, backend)}" if have else ""
        raise ValueError(f"accelerate: backend {backend!r} does not exist for {', '.join(missing)}{hint}")
    return wanted
