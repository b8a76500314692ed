"""The way of Hopper's kernels on CPU tensors: csrc/cuda as fibers (cuda_on_cpu.py), attention by stock PyTorch.

The attention's launch is what a GPU's would be, down to what the driver is given: a stand-in for Triton's binary takes
the arguments from Triton's launcher, or from C++, out of the memory that it points to.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import cuda_on_cpu
import torch

from fastvit import block_plan, use_backend
from fastvit.dispatch import OPS
from fastvit.ops import _contract, _cuda, _sm90

_FROM_C = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Compiled:
    """What Triton makes of a launch of the plain attention's forward."""

    def __init__(self, launch):
        q, k = launch.arguments[:2]
        self.q_shape, self.k_shape, self.dtype, self.unit = q.shape, k.shape, q.dtype, launch.constexprs["UNIT"]
        self.src = SimpleNamespace(signature=launch.aot_case("").signature)
        self.kinds = [kind for kind in self.src.signature.values() if kind != "constexpr"]
        self.packed_metadata = (4, 1, 0)
        self._callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p))(self._run_parameters)
        self.function = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.run = Launcher(self)

    def _run_parameters(self, parameters):
        kinds = [_FROM_C.get(kind, ctypes.c_uint64) for kind in self.kinds]
        self.attend(*(kind.from_address(parameters[i]).value for i, kind in enumerate(kinds)))

    def attend(self, q, k, v, out, lse, *numbers):
        strides, scale, (batch, heads, queries, _) = numbers[:12], numbers[12], self.q_shape
        assert numbers[13:16] == (heads, queries, self.k_shape[2])
        shapes = (self.q_shape, self.k_shape, self.k_shape, self.q_shape)
        q, k, v, out = (
            self._rows(ptr, shape, strides[3 * i : 3 * i + 3])
            for i, (ptr, shape) in enumerate(zip((q, k, v, out), shapes, strict=True))
        )
        out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale))
        saved = _memory(lse, batch * heads * queries, torch.float32).view(batch, heads, queries)
        saved.copy_((q.float() @ k.float().transpose(-2, -1) * scale).logsumexp(-1))

    def _rows(self, address, shape, strides):
        strides = (*(self.unit * stride for stride in strides), 1)
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return _memory(address, reach, self.dtype).as_strided(shape, strides)


class Launcher:
    """Called as Triton's own."""

    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, compiled):
        self.compiled = compiled

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        kinds = self.compiled.src.signature.values()
        self.compiled.attend(*(arg for kind, arg in zip(kinds, args, strict=True) if kind != "constexpr"))


def _memory(address, elements, dtype):
    return torch.frombuffer((ctypes.c_ubyte * (elements * dtype.itemsize)).from_address(address), dtype=dtype)


def launched(launch):
    """In the place of ``Launch.run``."""
    compiled = Compiled(launch)
    numbers = launch.arguments[5:]
    compiled.attend(*(tensor.data_ptr() for tensor in launch.arguments[:5]), *numbers)
    return compiled


@contextmanager
def hopper():
    """Blocks of CPU tensors in 16 bits run as on a Hopper GPU. Nothing that is remembered here outlives it."""
    from fastvit.kernels import _launch

    with ExitStack() as stack:
        for target, name, value in (
            (_contract, "why_not_compiled", lambda *args: []),
            (_contract, "why_not_triton", lambda *args: []),
            (_cuda, "ops", cuda_on_cpu.library()),
            (_sm90, "device_facts", lambda index: ((9, 0), cuda_on_cpu.MULTIPROCESSORS)),
            (_launch, "REPLAYED", True),
            (_launch, "current_device", lambda: None),
            (_launch, "current_stream", lambda device: 0),
            (_launch.Launch, "run", launched),
            (_launch, "_kept", {}),
            (block_plan, "_is_on_gpu", lambda x: True),
            (block_plan, "_plans", {}),
            *((op, "_settled", {}) for op in OPS.values()),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        backends = dict.fromkeys(("layernorm_linear", "linear_residual", "layernorm_mlp"), "cuda")
        stack.enter_context(use_backend(attention="triton", attention_packed="triton", **backends))
        yield
