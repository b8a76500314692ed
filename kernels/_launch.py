"""One description of a launch, to run it or to compile it ahead of time: what is checked is what runs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ._configs import AotCase, Limits

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TYPE_NAMES |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}


@cache
def limits(device: torch.device) -> Limits:
    """What the launch rules need to know of a device; an H200's numbers under the interpreter."""
    if device.type != "cuda":
        return Limits.of_arch(90)
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    return Limits(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def unit_strides(rows: tuple[Tensor, ...]) -> tuple[int, list[int]]:
    """(unit, leading strides of all in it). The unit is 8 elements if all strides allow it: 16-byte loads then."""
    strides = [stride for tensor in rows for stride in tensor.stride()[:-1]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return unit, [stride // unit for stride in strides]


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors, numbers and None, in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], arguments: tuple, constexprs: dict, settings: Any) -> Launch:
        """``settings`` names its tiles in ``constexprs()`` and has num_warps, num_stages and perhaps max_registers."""
        constexprs = {**constexprs, **settings.constexprs()}
        registers = getattr(settings, "max_registers", None)
        return cls(kernel, grid, arguments, constexprs, settings.num_warps, settings.num_stages, registers)

    def run(self) -> Any:
        """Launch; return what Triton compiled, None under the interpreter."""
        with torch.cuda.device_of(self.arguments[0]):
            return self.kernel[self.grid](*self.arguments, **self.constexprs, **self._options)

    def compile(self) -> None:
        """Into Triton's cache, for this process and others; nothing runs."""
        with torch.cuda.device_of(self.arguments[0]):
            self.kernel.warmup(*self.arguments, **self.constexprs, **self._options, grid=self.grid)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    @property
    def tiles(self) -> tuple[Any, ...]:
        """What tells two binaries of one kernel and dtype apart."""
        return self.constexprs, self.num_warps, self.num_stages, self.max_registers

    def aot_case(self, name: str) -> AotCase:
        """The same launch, specialised as the JIT would."""
        signature, constexprs, divisible = {}, dict(self.constexprs), []
        params = {param.name: param for param in self.kernel.params}
        for key, value in zip(params, self.arguments, strict=False):
            signature[key] = _type_name(value, bool(params[key].do_not_specialize))
            if signature[key] == "constexpr":
                constexprs[key] = value
            elif isinstance(value, Tensor) or (not params[key].do_not_specialize and value % 16 == 0):
                divisible.append(key)
        signature |= dict.fromkeys(self.constexprs, "constexpr")
        ordered = {key: signature[key] for key in params}
        options = (self.num_warps, self.num_stages, tuple(divisible), self.max_registers)
        return AotCase(name, self.kernel, ordered, constexprs, *options)


# Triton's way from arguments to a binary takes longer than a small kernel runs. The versions whose compiled kernels
# are known to be called as Replay does; with any other, every launch goes that way.
REPLAYED = triton.__version__.split("+")[0] in ("3.6.0",)
_MOST_KEPT = 1024
_MOST_NUMBERS = 24  # CompiledKernel's, in csrc/cuda/compiled_kernel.h
_FORMATS = {"i32": "=i", "i64": "=q", "fp32": "=f"}
_MORE_OF_A_LAUNCH = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
_kept: dict[tuple, tuple[Replay, ...]] = {}


@dataclass(frozen=True)
class Replay:
    """A launch that was made before, on other tensors of the same dtypes, sizes, strides and alignment."""

    compiled: Any
    grid: tuple[int, int, int]
    names: tuple[str, ...]
    """Of the tensors, which the kernel takes first."""
    rest: tuple[Any, ...]
    """Its other arguments."""

    @classmethod
    def of(cls, launch: Launch, compiled: Any) -> Replay:
        params = [param.name for param in launch.kernel.params]
        names = tuple(name.removesuffix("_ptr") for name in params if name.endswith("_ptr"))
        constexprs = (launch.constexprs[name] for name in params[len(launch.arguments) :])
        x, y, z = (*launch.grid, 1, 1)[:3]
        return cls(compiled, (x, y, z), names, (*launch.arguments[len(names) :], *constexprs))

    def packed(self) -> bytes:
        """What csrc/cuda/compiled_kernel.h launches: all but the pointers and the stream."""
        num_warps, _, shared = self.compiled.packed_metadata
        kinds = tuple(self.compiled.src.signature.values())[len(self.names) :]
        given = [(kind, value) for kind, value in zip(kinds, self.rest, strict=True) if kind != "constexpr"]
        numbers = [struct.pack(_FORMATS[kind], value).ljust(8, b"\0") for kind, value in given]
        header = struct.pack("=Q6I", self.compiled.function, *self.grid, 32 * num_warps, shared, len(numbers))
        return header + b"".join(numbers).ljust(8 * _MOST_NUMBERS, b"\0")

    def is_packable(self) -> bool:
        """Whether ``packed`` says all: no clusters, no scratch memory, nothing that Triton's launcher adds."""
        launcher, params = self.compiled.run, tuple(self.compiled.src.signature.values())
        more = [getattr(launcher, name, 1) for name in _MORE_OF_A_LAUNCH]
        numbers = [kind for kind in params[len(self.names) :] if kind != "constexpr"]
        return not any(more) and self.compiled.packed_metadata[1] == 1 and len(numbers) <= _MOST_NUMBERS

    @staticmethod
    def is_watched() -> bool:
        """Whether a profiler wants to hear of every launch."""
        runtime = triton.knobs.runtime
        return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))

    def __call__(self, stream: int, pointers: dict[str, int | None]) -> None:
        compiled = self.compiled
        given = [pointers[name] for name in self.names]
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *self.rest
        )


def facts(tensors: Iterable[Tensor | None]) -> tuple:
    """All that a launch depends on in its tensors, but for their addresses."""
    return tuple(t if t is None else (t.dtype, t.device, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors)


def run_on(tensors: dict[str, Tensor | None], key: tuple, build: Callable[[], list[Launch]]) -> None:
    """``run`` with the tensor ``x`` for a kernel's ``x_ptr``, the first of them on the device; ``key`` is all else."""
    device = next(t.device for t in tensors.values() if t is not None)
    pointers = {name: t if t is None else t.data_ptr() for name, t in tensors.items()}
    run((*key, facts(tensors.values())), device, pointers, build)


def run(key: tuple, device: torch.device, pointers: dict[str, int | None], build: Callable[[], list[Launch]]) -> None:
    """Run the launches that ``build`` describes; from the second time on without building them.

    key       all that they depend on but addresses: ``facts`` of the tensors, and numbers
    pointers  the address of ``x`` for a kernel's ``x_ptr``
    """
    kept = _kept.get(key)
    if kept is None or Replay.is_watched() or current_device() != device.index:
        launches = build()
        compiled = [launch.run() for launch in launches]
        if REPLAYED and all(hasattr(kernel, "packed_metadata") for kernel in compiled):
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[key] = tuple(map(Replay.of, launches, compiled))
        return
    stream = current_stream(device.index)
    for replay in kept:
        replay(stream, pointers)


def made(key: tuple) -> tuple[Replay, ...]:
    """What ``run`` would replay; nothing where it would not."""
    return _kept.get(key, ())


def current_device() -> int:
    return torch.cuda.current_device()


def current_stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def _type_name(value: Any, general: bool) -> str:
    """Triton's name of an argument's type; None, and 1 where integers are specialised, are constants."""
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if value is None or (value == 1 and not general):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
