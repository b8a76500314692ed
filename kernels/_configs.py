"""Launch settings of the kernels: named, frozen data, and the rule that picks one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel to compile ahead of time, as the JIT would build it for a real call."""

    name: str
    fn: Any  # the @triton.jit function
    signature: dict[str, str]  # every argument; "constexpr" for those in constexprs
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()  # arguments (pointers, strides) that are multiples of 16

    def compile(self, arch: int) -> Any:
        """Compile for sm_<arch> (80, 90, 100); needs no GPU. The result holds ``asm`` and ``metadata``."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        position = {name: index for index, name in enumerate(self.signature)}
        hints = {(position[name],): [["tt.divisibility", 16]] for name in self.divisible}
        source = ASTSource(self.fn, self.signature, {(position[k],): v for k, v in self.constexprs.items()}, hints)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
