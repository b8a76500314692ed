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
    max_registers: int | None = None
    waste: float | None = None  # share of the matrix products that falls on padding

    def compile(self, arch: int) -> Any:
        """Compile for sm_<arch> (80, 90, 100); needs no GPU. The result holds ``asm`` and ``metadata``."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        position = {name: index for index, name in enumerate(self.signature)}
        hints = {(position[name],): [["tt.divisibility", 16]] for name in self.divisible}
        source = ASTSource(self.fn, self.signature, {(position[k],): v for k, v in self.constexprs.items()}, hints)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@dataclass(frozen=True)
class AttentionSettings:
    """Tiles of one attention kernel: ``block_m`` queries by ``block_n`` keys a step, or all keys in tiles ``keys``."""

    cols: tuple[int, ...]  # the head dim in powers of two, e.g. 80 = 64 + 16
    block_m: int
    block_n: int = 0
    keys: tuple[int, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    running: bool = False  # the short forward meets its tiles one by one, with a running row maximum
    max_registers: int | None = None  # said, it keeps ptxas from spilling for the sake of occupancy

    @property
    def short(self) -> bool:
        return bool(self.keys)

    def constexprs(self) -> dict[str, Any]:
        tiles: dict[str, Any] = {"COLS": self.cols, "BLOCK_M": self.block_m}
        return {**tiles, "KEYS": self.keys} if self.keys else {**tiles, "BLOCK_N": self.block_n}


# (sm, kernel, dtype, head dim) -> ((fewest keys, most keys, settings), ...), as benchmarks/tune_attention.py prints it
ATTENTION_MEASURED: dict[tuple[int, str, str, int], tuple[tuple[int, int, AttentionSettings], ...]] = {}


def attention_settings(
    kernel: str, dtype: Any, dim: int, keys: int, arch: int = 90, general: bool = False, prepared: bool = False
) -> AttentionSettings:
    """Settings of ``kernel`` for a dtype, head dim and number of keys: the measured ones, or those of the rule below.

    kernel   "fwd"; "bwd", which is the short form or the one of dK and dV; "bwd_dq", which goes with the latter
    arch     from sm_90 operands may lie in shared memory; before, they take registers and tiles must be smaller
    general  with masks, dropout or ragged batches: streams at every length
    prepared with norms or rotations as well
    """
    hopper = arch >= 90
    if prepared:
        return _prepared_settings(kernel, dtype, dim, arch)
    if general:
        return _general_settings(kernel, dtype, dim, arch)
    for fewest, most, settings in ATTENTION_MEASURED.get((arch, kernel, str(dtype).removeprefix("torch."), dim), ()):
        if fewest <= keys <= most:
            return settings
    if dtype.itemsize == 4:
        cols = _fp32_cols(dim)
        if kernel == "fwd":
            return AttentionSettings(cols, 64, 32, num_warps=8, max_registers=168 if dim <= 80 else 255)
        if kernel == "bwd_dq":
            return AttentionSettings(cols, 32, 16, max_registers=168)
        if dim <= 96:
            return AttentionSettings(cols, 16, 32, max_registers=255)
        return AttentionSettings(cols, 16, 32, num_warps=8, num_stages=1, max_registers=255)
    wide = dim > 64
    cols = _half_cols(dim)
    if kernel == "fwd":
        tiles = power_of_two_parts(keys, 16, 3)
        if sum(tiles) <= (256 if hopper else 224) and not wide:
            if hopper:  # queries that wait in shared memory, or all scores in registers, would cost a third program
                return AttentionSettings(cols, 64, keys=tiles, num_stages=1, running=True)
            return AttentionSettings(cols, 64, keys=tiles)
        return AttentionSettings(cols, 128, 64, num_warps=8, num_stages=2 if wide else 3)
    if arch // 10 == 9 and cols == (64,):  # measured: two kernels of many small programs beat one that holds a head
        if kernel == "bwd_dq":
            return AttentionSettings(cols, 64, 32, num_stages=3)
        if dim == 64 and -(-keys // 64) % 2 == 0:  # whole blocks of 128, and no mask that would take registers
            return AttentionSettings(cols, 32, 128, num_warps=8, max_registers=128)
        return AttentionSettings(cols, 32, 64, num_stages=3)
    if kernel == "bwd_dq":
        return AttentionSettings(cols, 64, 64 if hopper or not wide else 32)
    if hopper and cols == (64,) and keys <= 256:  # dK and dV of a whole head stay in registers
        tiles = (64,) if keys <= 64 else (128,) if keys <= 128 else (128, 128)
        return AttentionSettings(cols, 32, keys=tiles, num_warps=8)
    if hopper:
        return AttentionSettings(cols, 64 if dim <= 80 else 32, 64, max_registers=255)
    return AttentionSettings(cols, 32, 64, num_warps=8 if dim > 96 else 4)


def _general_settings(kernel: str, dtype: Any, dim: int, arch: int) -> AttentionSettings:
    """Smaller tiles than plain calls take: a mask and the words of the random generator want registers too."""
    if dtype.itemsize == 4:
        cols = _fp32_cols(dim)
        if kernel == "fwd":
            return AttentionSettings(cols, 64, 32, num_warps=8, max_registers=168 if dim <= 80 else 255)
        if kernel == "bwd_dq":
            return AttentionSettings(cols, 32, 16, num_warps=4 if dim <= 96 else 8, num_stages=1, max_registers=255)
        return AttentionSettings(cols, 16, 32, num_stages=1, max_registers=255)
    wide = dim > 64
    cols = _half_cols(dim)
    if kernel == "fwd":
        if arch < 90 and wide:
            return AttentionSettings(cols, 64, 32)
        stages = 2 if wide else 3
        if arch // 10 == 9:
            return AttentionSettings(cols, 128, 64, num_warps=8, num_stages=stages)
        return AttentionSettings(cols, 128, 32, num_warps=8, num_stages=stages, max_registers=255)
    if kernel == "bwd_dq":
        return AttentionSettings(cols, 64 if arch >= 90 or not wide else 32, 32)
    if arch >= 90:
        return AttentionSettings(cols, 32, 64, num_warps=4 if dim <= 80 else 8, max_registers=255)
    return AttentionSettings(power_of_two_parts(dim, 32, 1), 32, 32)


def _prepared_settings(kernel: str, dtype: Any, dim: int, arch: int) -> AttentionSettings:
    """A row on its way through a norm and a rotation fills float32 registers five times over: fewer rows a warp."""
    hopper, wide = arch >= 90, dim > 64
    if dtype.itemsize == 4:
        cols = _fp32_cols(dim)
        if kernel == "fwd":
            return AttentionSettings(cols, 32, 16 if wide else 32, num_warps=8, max_registers=255)
        rows = 32 if kernel == "bwd_dq" and not wide else 16
        return AttentionSettings(cols, rows, 16, num_warps=8, num_stages=1, max_registers=255)
    cols = _half_cols(dim)
    if kernel == "fwd":
        if wide and not hopper:
            return AttentionSettings(cols, 64, 16, num_warps=8, max_registers=255)
        return AttentionSettings(cols, 64 if wide else 128, 32, num_warps=8, max_registers=255)
    if kernel == "bwd_dq":
        rows = 64 if not wide or (hopper and dim <= 104) else 32
        return AttentionSettings(cols, rows, 16 if wide else 32, num_warps=8, max_registers=255)
    if not hopper:
        return AttentionSettings(power_of_two_parts(dim, 32, 1), 16, 32, num_warps=8, max_registers=255)
    return AttentionSettings(cols, 16 if wide else 32, 64, num_warps=8, max_registers=255)


@dataclass(frozen=True)
class FewSettings:
    """Keys a step of a kernel for as many as ``queries`` queries."""

    cols: tuple[int, ...]
    queries: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    def constexprs(self) -> dict[str, Any]:
        return {"COLS": self.cols, "QUERIES": self.queries, "BLOCK_N": self.block_n}


def few_settings(kernel: str, dtype: Any, dim: int, queries: int) -> FewSettings:
    """Blocks of at most 8 k values of K: all loads of a step are in flight at once, and the rest fits the registers."""
    cols = _half_cols(dim)
    values = 8192 if kernel == "fwd" and dtype.itemsize == 2 and queries <= 2 else 4096
    many = kernel == "bwd" and queries > 2
    block_n = max(16, min(128, (2048 if many else values) // (1 << (sum(cols) - 1).bit_length())))
    registers = 255 if kernel == "bwd" and dtype.itemsize == 4 else None
    return FewSettings(cols, 1 << (queries - 1).bit_length(), block_n, 8 if many else 4, max_registers=registers)


def _fp32_cols(dim: int) -> tuple[int, ...]:
    """IEEE products run on the plain FMA units, one product after the other: each part of a score or of dP is a chain
    of 16, as short as tl.dot allows, with a sum of its own (``add_dot``)."""
    return (16,) * -(-dim // 16)


def _half_cols(dim: int) -> tuple[int, ...]:
    return power_of_two_parts(dim, 16, 2) if dim > 64 else power_of_two_parts(dim, 32, 1)


def pair_cols(dtype: Any, dim: int, cols: tuple[int, ...]) -> tuple[int, ...]:
    """Half of the head dim in powers of two, for heads that are held in pairs of parts: 80 is (32 + 16) twice.

    cols   of the settings: one part stays one pair, padded
    """
    if len(cols) == 1:
        return (cols[0] // 2,)
    return _fp32_cols(dim // 2) if dtype.itemsize == 4 else power_of_two_parts(dim // 2, 16, 2)


def power_of_two_parts(size: int, unit: int, count: int) -> tuple[int, ...]:
    """Cover ``size`` with at most ``count`` different powers of two, each at least ``unit``: 197 is 128 + 64 + 16."""
    total = -(-size // unit) * unit
    while total.bit_count() > count:
        total += total & -total
    return tuple(1 << bit for bit in reversed(range(total.bit_length())) if total >> bit & 1)


@dataclass(frozen=True)
class Limits:
    """What a rule may ask of a device: compute capability, multiprocessors, bytes of shared memory for one program."""

    arch: int
    processors: int
    shared: int

    @classmethod
    def of_arch(cls, arch: int) -> Limits:
        """Of A100 (80), H200 (90), B200 (100)."""
        return {80: cls(80, 108, 163 * 1024), 90: cls(90, 132, 227 * 1024), 100: cls(100, 148, 227 * 1024)}[arch]


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

    def tiles(self, rows: int, cols: int) -> int:
        return -(-rows // self.block_m) * -(-cols // self.block_n)


@dataclass(frozen=True)
class SumSettings:
    """Tile of a sum over samples: samples in flight by columns."""

    block_b: int
    block_n: int
    num_warps: int
    num_stages: int = 1

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_B": self.block_b, "BLOCK_N": self.block_n}


# named by the least matrix unit they suit: mma.sync (8.x, 12.x), wgmma (9.0) and tcgen05 (10.x)
PATCH_EMBED_MMA = {
    "fwd": PatchEmbedSettings(128, 128, 32, num_warps=8, num_stages=4),
    "dimages": PatchEmbedSettings(128, 128, 32, num_warps=8, num_stages=4),
    "dweight": PatchEmbedSettings(128, 128, 32, num_warps=8, num_stages=4),
}
PATCH_EMBED_WGMMA = {
    "fwd": PatchEmbedSettings(128, 256, 64, num_warps=8, num_stages=4),
    "dimages": PatchEmbedSettings(128, 128, 64, num_warps=8, num_stages=4),
    "dweight": PatchEmbedSettings(256, 128, 64, num_warps=8, num_stages=4),  # narrow on the side that is gathered
}
PATCH_EMBED_SMALL = PatchEmbedSettings(64, 64, 64, num_warps=4, num_stages=4)
PATCH_EMBED_FP32 = PatchEmbedSettings(64, 64, 16, num_warps=4, num_stages=3)  # IEEE products, no tensor cores
PATCH_EMBED_SUM = SumSettings(block_b=32, block_n=256, num_warps=4)


def patch_embed_settings(
    kernel: str, dtype: Any, rows: int, cols: int, operand_bytes: tuple[int, int], device: Limits, splits: int = 1
) -> PatchEmbedSettings:
    """Settings of ``kernel`` for a (rows, cols) result whose reduction may be cut into as many as ``splits`` parts.

    operand_bytes   of one value of either operand as it lies in memory: the stages must fit the shared memory
    """
    large = (PATCH_EMBED_WGMMA if device.arch // 10 in (9, 10) else PATCH_EMBED_MMA)[kernel]
    if dtype.itemsize == 4:
        choice = PATCH_EMBED_FP32
    elif large.tiles(rows, cols) * splits >= device.processors:
        choice = large
    else:
        choice = PATCH_EMBED_SMALL  # more and smaller tiles, so that small batches fill the device too
    stage = choice.block_k * (choice.block_m * operand_bytes[0] + choice.block_n * operand_bytes[1])
    parts = min(splits, max(1, device.processors // choice.tiles(rows, cols)))
    return replace(choice, num_stages=max(1, min(choice.num_stages, device.shared // stage)), splits=parts)
