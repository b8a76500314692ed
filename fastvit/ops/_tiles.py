"""How Hopper's products are cut into tiles: timed settings by name, and a rule for the shapes nobody has timed.

Every tile adds up a product in the same order, so the choice between them never changes a bit of the result, and an
image's result does not depend on the batch it is in. Whether LayerNorm is folded does change bits: it is chosen by the
weight's shape alone, never by the number of rows.
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
    cluster: int
    """Tiles above each other that share what they load of the weight."""
    share: float
    """Part of the arithmetic rate the main loop is expected to reach."""
    overlaps: bool
    """Whether the next tile's main loop hides the epilogue."""

    def clocks(self, rows: int, cols: int, depth: int, multiprocessors: int) -> float:
        """Expected clocks of a (rows, depth) x (depth, cols) product."""
        clusters = _ceil(_ceil(rows, self.rows), self.cluster) * _ceil(cols, self.cols)
        waves = _ceil(clusters, max(multiprocessors // self.cluster, 1))
        main = self.rows * self.cols * depth / (MACS_PER_CLOCK * self.share)
        epilogue = self.rows * self.cols * EPILOGUE_CLOCKS / LANES
        return waves * max(main, epilogue) + epilogue if self.overlaps else waves * (main + epilogue)


LARGE = Tile("large", 128, 256, cluster=2, share=0.85, overlaps=False)
PING_PONG = Tile("ping_pong", 128, 128, cluster=2, share=0.8, overlaps=True)
SMALL = Tile("small", 64, 64, cluster=1, share=0.4, overlaps=True)

# What is compiled, by dtype and op.
FORWARD = {"bfloat16": (LARGE, PING_PONG, SMALL), "float16": (PING_PONG, SMALL)}
BACKWARD = {"bfloat16": (LARGE, PING_PONG), "float16": (PING_PONG,)}
TILES = {"linear_act": FORWARD, "linear_residual": FORWARD, "linear_act_grad": BACKWARD}

# (op, dtype, rows, cols, depth) -> name of the fastest tile. `python benchmarks/tune_mlp.py` on a Hopper GPU prints it.
# On an H100; with fewer rows than these the host's time to launch was all there was to see.
TIMED: dict[tuple[str, str, int, int, int], str] = {
    ("linear_act", "bfloat16", 12608, 2304, 768): "ping_pong",
    ("linear_act", "bfloat16", 12608, 3072, 768): "ping_pong",
    ("linear_residual", "bfloat16", 12608, 768, 768): "ping_pong",
    ("linear_residual", "bfloat16", 12608, 768, 3072): "ping_pong",
    ("linear_act_grad", "bfloat16", 12608, 3072, 768): "ping_pong",
    ("linear_act", "bfloat16", 50432, 2304, 768): "ping_pong",
    ("linear_act", "bfloat16", 50432, 3072, 768): "large",
    ("linear_residual", "bfloat16", 50432, 768, 768): "ping_pong",
    ("linear_residual", "bfloat16", 50432, 768, 3072): "large",
    ("linear_act_grad", "bfloat16", 50432, 3072, 768): "large",
    ("linear_act", "bfloat16", 12608, 3072, 1024): "ping_pong",
    ("linear_act", "bfloat16", 12608, 4096, 1024): "ping_pong",
    ("linear_residual", "bfloat16", 12608, 1024, 1024): "ping_pong",
    ("linear_residual", "bfloat16", 12608, 1024, 4096): "ping_pong",
    ("linear_act_grad", "bfloat16", 12608, 4096, 1024): "ping_pong",
    ("linear_act", "bfloat16", 50432, 3072, 1024): "ping_pong",
    ("linear_act", "bfloat16", 50432, 4096, 1024): "ping_pong",
    ("linear_residual", "bfloat16", 50432, 1024, 1024): "ping_pong",
    ("linear_residual", "bfloat16", 50432, 1024, 4096): "large",
    ("linear_act_grad", "bfloat16", 50432, 4096, 1024): "large",
}

# (dtype, cols, depth) of the weights that LayerNorm is folded into: where the same command found it faster.
FOLDED: frozenset[tuple[str, int, int]] = frozenset()


@lru_cache(maxsize=1024)
def choose(op: str, dtype: str, rows: int, cols: int, depth: int, multiprocessors: int = 132) -> str:
    """The tile for this product: the timed one, or the one the rule expects to take the fewest clocks."""
    timed = TIMED.get((op, dtype, rows, cols, depth))
    if timed is not None:
        return timed
    return min(TILES[op][dtype], key=lambda tile: tile.clocks(rows, cols, depth, multiprocessors)).name


def is_folded(dtype: str, cols: int, depth: int) -> bool:
    return (dtype, cols, depth) in FOLDED


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
