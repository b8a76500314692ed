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
    """What Triton makes of a launch of the plain attention."""

    def __init__(self, launch):
        self.compute = _COMPUTE[launch.kernel.fn.__name__]
        tensors = [argument for argument in launch.arguments if isinstance(argument, torch.Tensor)]
        self.shapes, self.dtypes = [t.shape for t in tensors], [t.dtype for t in tensors]
        self.unit = launch.constexprs["UNIT"]
        self.src = SimpleNamespace(signature=launch.aot_case("").signature)
        self.kinds = [kind for kind in self.src.signature.values() if kind != "constexpr"]
        self.packed_metadata = (4, 1, 0)
        self._callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p))(self._run_parameters)
        self.function = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.run = Launcher(self)

    def _run_parameters(self, parameters):
        kinds = [_FROM_C.get(kind, ctypes.c_uint64) for kind in self.kinds]
        self.attend(*(kind.from_address(parameters[i]).value for i, kind in enumerate(kinds)))

    def attend(self, *arguments):
        """Rows (B, H, N, D) first, by three strides each; then statistics (B, H, N), contiguous."""
        addresses, numbers = arguments[: len(self.shapes)], list(arguments[len(self.shapes) :])
        tensors = []
        for address, shape, dtype in zip(addresses, self.shapes, self.dtypes, strict=True):
            if len(shape) == 4:
                strides = [self.unit * numbers.pop(0) for _ in range(3)]
                tensors.append(_rows(address, shape, dtype, (*strides, 1)))
            else:
                tensors.append(_memory(address, shape.numel(), dtype).view(shape))
        scale, *sizes = numbers
        _, heads, queries, _ = self.shapes[0]
        assert sizes[:3] == [heads, queries, self.shapes[1][2]]
        self.compute(scale, *tensors)


def _forward(scale, q, k, v, out, lse):
    out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale))
    lse.copy_((q.float() @ k.float().transpose(-2, -1) * scale).logsumexp(-1))


def _dq(scale, q, k, v, out, dout, dq, lse, delta):
    delta.copy_((out.float() * dout.float()).sum(-1))
    dq.copy_(_score_gradients(scale, q, k, v, dout, lse, delta)[0] @ k.float() * scale)


def _dkv(scale, q, k, v, dout, dk, dv, lse, delta):
    scores, weights = _score_gradients(scale, q, k, v, dout, lse, delta)
    dk.copy_(scores.transpose(-2, -1) @ q.float() * scale)
    dv.copy_(weights.transpose(-2, -1) @ dout.float())


def _all_gradients(scale, q, k, v, out, dout, dq, dk, dv, lse):
    delta = lse.new_empty(lse.shape)
    _dq(scale, q, k, v, out, dout, dq, lse, delta)
    _dkv(scale, q, k, v, dout, dk, dv, lse, delta)


def _score_gradients(scale, q, k, v, dout, lse, delta):
    weights = (q.float() @ k.float().transpose(-2, -1) * scale - lse[..., None]).exp()
    return weights * (dout.float() @ v.float().transpose(-2, -1) - delta[..., None]), weights


_COMPUTE = {
    "_attention_fwd_kernel": _forward,
    "_attention_short_fwd_kernel": _forward,
    "_attention_few_fwd_kernel": _forward,
    "_attention_bwd_dq_kernel": _dq,
    "_attention_bwd_dkv_kernel": _dkv,
    "_attention_few_bwd_kernel": _all_gradients,
}


def _rows(address, shape, dtype, strides):
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return _memory(address, reach, dtype).as_strided(shape, strides)


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
    compiled.attend(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in launch.arguments))
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
            (block_plan.hopper, "_packed", {}),
            *((op, "_settled", {}) for op in OPS.values()),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        backends = dict.fromkeys(("layernorm_linear", "linear_residual", "layernorm_mlp"), "cuda")
        stack.enter_context(use_backend(attention="triton", attention_packed="triton", **backends))
        yield
