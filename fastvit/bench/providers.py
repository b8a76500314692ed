"""The ways to run an op or a model that are compared: ours, stock PyTorch, and each compiled, replayed or autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch import use_backend


@dataclass(frozen=True)
class Provider:
    """One way to run an op or a model."""

    ours: bool
    compiled: bool = False  # torch.compile, at its strongest
    graph: bool = False  # captured once as a CUDA graph, then replayed
    autocast: bool = False  # float32 parameters under autocast
    runtime: str = ""  # another inference runtime, see runtimes.py
    memory: str = "default"  # of ours: what a block keeps for its backward, see fastvit.accelerate
    attention: str = ""  # of ours: the backend of attention_packed, where it is not the one that is chosen


PROVIDERS = {
    "fastvit": Provider(ours=True),
    "eager": Provider(ours=False),
    "compile": Provider(ours=False, compiled=True),
    "fastvit-compile": Provider(ours=True, compiled=True),
    "fastvit-graph": Provider(ours=True, graph=True),
    "eager-graph": Provider(ours=False, graph=True),
    "fastvit-autocast": Provider(ours=True, autocast=True),
    "eager-autocast": Provider(ours=False, autocast=True),
    "fastvit-lean": Provider(ours=True, memory="lean"),
    "fastvit-cuda-attention": Provider(ours=True, attention="cuda"),
    "fastvit-cuda-attention-graph": Provider(ours=True, attention="cuda", graph=True),
    "onnxruntime": Provider(ours=False, runtime="onnxruntime"),
    "openvino": Provider(ours=False, runtime="openvino"),
}


class Refused(RuntimeError):
    """Not timed, and why: its result is not as accurate as stock PyTorch's, or it cannot run here."""


class Missing(Refused):
    """Not timed because it is not installed, or has no such thing: no fault of its results."""


@contextlib.contextmanager
def running(provider: Provider, backend: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Everything that has to be in force while ``provider`` runs."""
    with contextlib.ExitStack() as stack:
        if provider.ours:
            stack.enter_context(use_backend(backend))
            if provider.attention:
                stack.enter_context(use_backend(attention_packed=provider.attention))
        else:
            stack.enter_context(best_attention(device, dtype))
        if provider.autocast:
            stack.enter_context(torch.autocast(device.type, dtype))
        yield


def best_attention(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """PyTorch's fastest attention: on Hopper and later that is cuDNN's, which it does not choose by itself."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0) or dtype.itemsize != 2:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def compile_options(device: torch.device, *, whole_model: bool, training: bool) -> dict[str, Any]:
    """Arguments of ``torch.compile`` that make it strongest: its own graphs where they pay, packed weights on a CPU."""
    if device.type == "cuda":
        mode = "max-autotune" if whole_model and not training else "max-autotune-no-cudagraphs"
        return {"dynamic": False, "mode": mode}
    if whole_model and not training:
        return {"dynamic": False, "options": {"freezing": True}}
    return {"dynamic": False}


def capture(call: Callable[[], Any]) -> tuple[Callable[[Any], Any], Any]:
    """(replay, static result) of ``call`` as a CUDA graph; ``call`` must read the same tensors every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return lambda _: graph.replay(), result
