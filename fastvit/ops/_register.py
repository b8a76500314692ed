"""Register an op with PyTorch: schema, implementation, fake, autograd and double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_LIBRARY = torch.library.Library("fastvit", "FRAGMENT")


def define(name: str, schema: str, impl: Callable, fake: Callable) -> Callable:
    """Define ``fastvit::<name><schema>``; return what calls it. The same ``impl`` serves every device.

    Where nobody watches, ``impl`` is called straight away: PyTorch's way through a Python op costs more than it does.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastvit, name).default
    takes_gradient = name.endswith("_bwd")

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(args) or (takes_gradient and is_batched(args[0])):
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, args)
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _FUNCTIONS[name].apply(*args) if name in _FUNCTIONS else op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return impl(*args)

    IMPLS[name] = impl
    return call


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))
IMPLS: dict[str, Callable] = {}
_FUNCTIONS: dict[str, Any] = {}


def _is_watched(args: tuple) -> bool:
    """Whether a tracer, a transform, a mode or a tensor's own class may want to see the op."""
    return not _PLAIN.issuperset(map(type, args)) or is_watched_by_any_mode()


def _refuse_tangents(name: str, args: tuple) -> None:
    """A custom op would drop them without a word."""
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise NotImplementedError(f"fastvit::{name} has no forward derivative: run the forward inside as well")


is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether ``torch.autograd.grad(is_grads_batched=True)`` made this gradient of several, which no mode tells."""


def is_watched_by_any_mode() -> bool:
    """Whether a tracer, a transform or a mode may want to see ops, whatever their arguments."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _has_watching_function_mode())
        or torch._C._get_tracing_state() is not None
        or is_transformed()
    )


def _has_watching_function_mode() -> bool:
    """``torch.set_default_device`` and ``with torch.device`` are modes too, which look at new tensors' devices."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    """Give ``fastvit::<name>`` its gradient formula."""
    torch.library.register_autograd(f"fastvit::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    _FUNCTIONS[name] = _function(name, setup_context, backward)


def _function(name: str, setup_context: Callable, backward: Callable) -> Any:
    """What ``torch.library`` makes of the same formula, without its way there."""
    impl = IMPLS[name]

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = impl(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"fastvit_{name}", (torch.autograd.Function,), members)


def register_double_backward(name: str, meaning: Callable, inputs: Sequence[str], arguments: Sequence[str]) -> None:
    """Differentiate ``fastvit::<name>``, a backward op, by running ``meaning`` (the forward) in plain PyTorch.

    ``arguments`` names the op's arguments in order; the first is the gradient of the output, and ``inputs`` are the
    arguments of ``meaning``, given to it by name. Tensor arguments that are not in ``inputs`` are saved results of the
    forward: their dependence runs through the inputs. The op's results are the gradients of its leading ``inputs``.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = {n: v for n, v in zip(arguments, inputs, strict=True) if isinstance(v, Tensor)}
        ctx.tensor_names = list(tensors)
        ctx.values = {n: v for n, v in zip(arguments, inputs, strict=True) if not isinstance(v, Tensor)}
        ctx.save_for_backward(*tensors.values())
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple:
        values = ctx.values | dict(zip(ctx.tensor_names, ctx.saved_tensors, strict=True))
        with torch.enable_grad():
            known = {n: _alias(values[n]) for n in inputs}
            grad_output = _alias(values[arguments[0]])
            differentiable = [n for n in inputs if isinstance(known[n], Tensor) and known[n].requires_grad]
            output = meaning(**known)
            grads = torch.autograd.grad(
                output, [known[n] for n in differentiable], grad_output, create_graph=True, allow_unused=True
            )
            pairs = [
                (grad, grads_of_grads[inputs.index(n)])
                for n, grad in zip(differentiable, grads, strict=True)
                if grad is not None and inputs.index(n) < len(grads_of_grads)
            ]
            pairs = [(g, gg) for g, gg in pairs if gg is not None and gg.numel() == g.numel() and g.requires_grad]
            sources = [grad_output] + [known[n] for n in differentiable]
            if not pairs:
                return (None,) * len(arguments)
            second = torch.autograd.grad(
                [g for g, _ in pairs],
                sources,
                [gg for _, gg in pairs],
                allow_unused=True,
                create_graph=torch.is_grad_enabled(),
            )
        by_name = dict(zip([arguments[0], *differentiable], second, strict=True))
        return tuple(by_name.get(n) for n in arguments)

    register_autograd(name, setup_context, backward)


def _alias(value: Any) -> Any:
    """A tensor of its own in the graph: ``grad_output`` may itself depend on the inputs, and must count once."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
