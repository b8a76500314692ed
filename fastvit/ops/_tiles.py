"""How Hopper's products are cut into tiles: timed settings by name, and a rule for the shapes nobody has timed.

Every tile adds up a product in the same order, so the choice between them never changes a bit of the result, and an
image's result does not depend on the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

MACS_PER_CLOCK = 2048  # 16-bit multiply-adds of one multiprocessor
EPILOGUE_CLOCKS = 24  # instructions on one element after its sum is complete
LANES = 128


@dataclass(frozen=True)
class Tile:
    """One compiled way to cut a product; see csrc/cuda/sm90/gemm.h."""

    name: str
    rows: int
    cols: int
    cluster: tuple[int, int]
    """Tiles above and beside each other that share what they load."""
    share: float
    """Part of the arithmetic rate the main loop is expected to reach."""

    def clocks(self, rows: int, cols: int, depth: int, multiprocessors: int) -> float:
        """Expected clocks of a (rows, depth) x (depth, cols) product; the next tile's main loop hides the epilogue."""
        down, across = self.cluster
        clusters = _ceil(_ceil(rows, self.rows), down) * _ceil(_ceil(cols, self.cols), across)
        waves = _ceil(clusters, max(multiprocessors // (down * across), 1))
        main = self.rows * self.cols * depth / (MACS_PER_CLOCK * self.share)
        epilogue = self.rows * self.cols * EPILOGUE_CLOCKS / LANES
        return waves * max(main, epilogue) + epilogue


TILES = {
    "linear_act": (Tile("large", 128, 128, (2, 1), share=0.8), Tile("small", 64, 96, (1, 1), share=0.5)),
    "linear_residual": (Tile("large", 128, 128, (2, 1), share=0.8), Tile("small", 64, 64, (2, 2), share=0.45)),
}

# linear_act_grad also has a "small" tile, 128 x 128 by warpgroups in turns, which nobody has timed yet.
ACT_GRAD = "large"

# (op, dtype, rows, cols, depth) -> name of the fastest tile. `python benchmarks/tune_mlp.py` on a Hopper GPU prints it.
# On an H200.
TIMED: dict[tuple[str, str, int, int, int], str] = {
    ("linear_act", "bfloat16", 197, 2304, 768): "small",
    ("linear_act", "bfloat16", 197, 3072, 768): "small",
    ("linear_residual", "bfloat16", 197, 768, 768): "small",
    ("linear_residual", "bfloat16", 197, 768, 3072): "small",
    ("linear_act", "bfloat16", 1576, 2304, 768): "large",
    ("linear_act", "bfloat16", 1576, 3072, 768): "large",
    ("linear_residual", "bfloat16", 1576, 768, 768): "small",
    ("linear_residual", "bfloat16", 1576, 768, 3072): "large",
    ("linear_act", "bfloat16", 12608, 2304, 768): "large",
    ("linear_act", "bfloat16", 12608, 3072, 768): "large",
    ("linear_residual", "bfloat16", 12608, 768, 768): "large",
    ("linear_residual", "bfloat16", 12608, 768, 3072): "large",
    ("linear_act", "bfloat16", 50432, 2304, 768): "large",
    ("linear_act", "bfloat16", 50432, 3072, 768): "large",
    ("linear_residual", "bfloat16", 50432, 768, 768): "large",
    ("linear_residual", "bfloat16", 50432, 768, 3072): "large",
    ("linear_act", "bfloat16", 197, 3072, 1024): "small",
    ("linear_act", "bfloat16", 197, 4096, 1024): "small",
    ("linear_residual", "bfloat16", 197, 1024, 1024): "small",
    ("linear_residual", "bfloat16", 197, 1024, 4096): "small",
    ("linear_act", "bfloat16", 1576, 3072, 1024): "large",
    ("linear_act", "bfloat16", 1576, 4096, 1024): "large",
    ("linear_residual", "bfloat16", 1576, 1024, 1024): "large",
    ("linear_residual", "bfloat16", 1576, 1024, 4096): "large",
    ("linear_act", "bfloat16", 12608, 3072, 1024): "large",
    ("linear_act", "bfloat16", 12608, 4096, 1024): "large",
    ("linear_residual", "bfloat16", 12608, 1024, 1024): "large",
    ("linear_residual", "bfloat16", 12608, 1024, 4096): "large",
    ("linear_act", "bfloat16", 50432, 3072, 1024): "large",
    ("linear_act", "bfloat16", 50432, 4096, 1024): "large",
    ("linear_residual", "bfloat16", 50432, 1024, 1024): "large",
    ("linear_residual", "bfloat16", 50432, 1024, 4096): "large",
}


@lru_cache(maxsize=1024)
def choose(op: str, dtype: str, rows: int, cols: int, depth: int, multiprocessors: int = 132) -> str:
    """The tile for this product: the timed one, or the one the rule expects to take the fewest clocks."""
    timed = TIMED.get((op, dtype, rows, cols, depth))
    if timed is not None:
        return timed
    return min(TILES[op], key=lambda tile: tile.clocks(rows, cols, depth, multiprocessors)).name


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
