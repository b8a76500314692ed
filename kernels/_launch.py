"""One description of a launch, to run it or to compile it ahead of time: what is checked is what runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._configs import AotCase, Limits

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8"}


@cache
def limits(device: torch.device) -> Limits:
    """What the launch rules need to know of a device; an H200's numbers under the interpreter."""
    if device.type != "cuda":
        return Limits.of_arch(90)
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    return Limits(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors, integers and None, in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], arguments: tuple, constexprs: dict, settings: Any) -> Launch:
        """``settings`` names its tiles in ``constexprs()`` and has num_warps and num_stages."""
        constexprs = {**constexprs, **settings.constexprs()}
        return cls(kernel, grid, arguments, constexprs, settings.num_warps, settings.num_stages)

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages)

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
        return AotCase(name, self.kernel, ordered, constexprs, self.num_warps, self.num_stages, tuple(divisible))


def _type_name(value: Any, general: bool) -> str:
    """Triton's name of an argument's type; None, and 1 where integers are specialised, are constants."""
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if value is None or (value == 1 and not general):
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
