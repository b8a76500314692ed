"""One op at one size: what all providers share, and each provider made ready to be timed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..dispatch import OPS, Unsupported, use_backend
from ..testing import Shape, cast_inputs, make_inputs, run_with_gradients
from . import stock
from .accuracy import check, sample
from .costs import op_cost
from .providers import PROVIDERS, Refused, best_attention, capture, compile_options, running
from .timing import Candidate

MODES = ("fwd", "bwd", "full")
NAMES = (
    "patch_embed",
    "attention",
    "attention_packed",
    "attention_varlen",
    "layernorm_linear",
    "linear_residual",
    "layernorm_mlp",
)


class OpCase:
    """``mode`` is "fwd" (no gradients), "bwd" (the backward alone) or "full" (forward and backward)."""

    def __init__(self, op: str, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, mode: str):
        self.op, self.dtype, self.device, self.mode = op, dtype, device, mode
        self.cost = op_cost(op, shape, batch, dtype.itemsize, mode)
        self.inputs = make_inputs(op, shape, batch, dtype, str(device))
        if "images" in self.inputs:  # no training step asks for their gradient
            self.inputs["images"].requires_grad_(False)
        self.wanted = [value for value in self.inputs.values() if isinstance(value, Tensor) and value.requires_grad]
        with torch.no_grad():
            size = getattr(stock, op)(**self.inputs).shape
        self.grad_output = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        return sample(self._results(getattr(reference, self.op), cast_inputs(self.inputs, torch.float64)))

    @functools.cached_property
    def eager(self) -> dict[str, Tensor]:
        with best_attention(self.device, self.dtype):
            return sample(self._results(getattr(stock, self.op), self.inputs))

    def candidate(self, name: str) -> Candidate:
        """The provider, checked and ready to time; raises ``Refused``."""
        provider = PROVIDERS[name]
        if provider.autocast or provider.runtime or provider.memory != "default":
            raise Refused(f"{name} is for models")
        if provider.graph and (self.device.type != "cuda" or self.mode != "fwd"):
            raise Refused("a CUDA graph is replayed for fwd on a GPU only")
        if provider.attention and self.op != "attention_packed":
            raise Refused(f"{name} is for attention_packed and models")
        backend = provider.attention or (self._backend() if provider.ours else "torch")
        fn = getattr(ops if provider.ours else stock, self.op)
        if provider.compiled:
            fn = torch.compile(fn, **compile_options(self.device, whole_model=False, training=self.mode != "fwd"))
        context = functools.partial(running, provider, backend, self.device, self.dtype)
        with context():
            error = check(sample(self._results(fn, self.inputs)), self.eager, self.exact)
            call, prepare = self._timed(fn)
            if provider.graph:
                call, prepare = capture(lambda: call(None))[0], _nothing
        return Candidate(name, call, prepare, context, {"backend": backend, "error": error})

    def _backend(self) -> str:
        """The first of the op's backends that takes these inputs, kernels before plain PyTorch."""
        for backend in (name for name, backend in OPS[self.op].backends.items() if not backend.only_by_name):
            with contextlib.suppress(Unsupported), use_backend(backend), torch.no_grad():
                getattr(ops, self.op)(**self.inputs)
                return backend
        raise Refused(f"no backend of {self.op} takes these inputs")

    def _results(self, fn: Callable[..., Tensor], inputs: dict) -> dict[str, Tensor]:
        if self.mode == "fwd":
            with torch.no_grad():
                return {"output": fn(**inputs)}
        return run_with_gradients(fn, inputs, self.grad_output)

    def _timed(self, fn: Callable[..., Tensor]) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        """(call, prepare) of this mode."""

        def forward() -> Tensor:
            return fn(**self.inputs)

        def backward(output: Tensor) -> Any:
            return torch.autograd.grad(output, self.wanted, self.grad_output)

        if self.mode == "fwd":
            return torch.no_grad()(lambda _: forward()), _nothing
        if self.mode == "bwd":
            return backward, forward
        return lambda _: backward(forward()), _nothing


def _nothing() -> None:
    return None
