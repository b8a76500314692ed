"""Launch settings of the kernels: named, frozen data, and the rule that picks one."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class AttentionSettings:
    """Tiles of one attention kernel: queries by keys by head dim."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}


def attention_settings(kernel: str, dtype: Any, dim: int) -> AttentionSettings:
    """Settings of ``kernel`` ("fwd", "bwd_dq", "bwd_dkv") for a dtype and head dim."""
    block_d = 32 if dim <= 32 else 64 if dim <= 64 else 128
    if dtype.itemsize == 4:
        return AttentionSettings(32, 32, block_d, 4, 1)
    return AttentionSettings(64, 64, block_d, 4, 2)


@dataclass(frozen=True)
class PatchEmbedSettings:
    """Tiles of one patch embedding GEMM (rows, columns, reduction), and the number of parts of its reduction."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def tiles(self, rows: int, cols: int) -> int:
        return -(-rows // self.block_m) * -(-cols // self.block_n)


PATCH_EMBED_LARGE = PatchEmbedSettings(128, 256, 64, num_warps=8, num_stages=4)
PATCH_EMBED_SMALL = PatchEmbedSettings(64, 64, 64, num_warps=4, num_stages=4)
PATCH_EMBED_FP32 = PatchEmbedSettings(64, 64, 16, num_warps=4, num_stages=3)  # IEEE products, no tensor cores


def patch_embed_settings(
    dtype: Any, rows: int, cols: int, *, operand_bytes: tuple[int, int], processors: int, shared: int, splits: int = 1
) -> PatchEmbedSettings:
    """Settings of a (rows, cols) result whose reduction may be cut into as many as ``splits`` parts.

    operand_bytes   bytes of one value of either operand as it lies in memory
    shared          bytes of shared memory a program may use: the number of stages fits them
    """
    if dtype.itemsize == 4:
        choice = PATCH_EMBED_FP32
    elif PATCH_EMBED_LARGE.tiles(rows, cols) * splits >= processors:
        choice = PATCH_EMBED_LARGE
    else:
        choice = PATCH_EMBED_SMALL  # more and smaller tiles, so that small batches fill the device too
    stage = choice.block_k * (choice.block_m * operand_bytes[0] + choice.block_n * operand_bytes[1])
    parts = min(splits, max(1, processors // choice.tiles(rows, cols)))
    return replace(choice, num_stages=max(1, min(choice.num_stages, shared // stage)), splits=parts)
