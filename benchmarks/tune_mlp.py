"""Time every tile of Hopper's products at ViT's shapes and print the table to commit in fastvit/ops/_tiles.py.

    python benchmarks/tune_mlp.py [--models base,large] [--batches 1,8,64,256] [--dtypes bfloat16,float16]

Needs a GPU of compute capability 9.0 and the CUDA library with Hopper's products. Nothing is timed at import or at run
time: what is printed here is pasted there, and the rule serves every other shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastvit import _extension
from fastvit.ops import _sm90, _tiles
from fastvit.testing import VIT_SHAPES

ROUNDS, CALLS = 7, 20


@dataclass(frozen=True)
class Product:
    op: str
    dtype: str
    rows: int
    cols: int
    depth: int

    @property
    def finish(self) -> tuple[str, bool]:
        """(activation, whether its argument is kept): qkv has none, fc1 is timed as training runs it."""
        return ("none", False) if self.cols == 3 * self.depth else ("gelu", True)


def products(models: list[str], batches: list[int], dtypes: list[str]) -> Iterator[Product]:
    """The products of a block: qkv, fc1, projection and fc2."""
    for model in models:
        shape = VIT_SHAPES[model]
        dim, hidden = shape.embed_dim, shape.hidden_dim
        for dtype in dtypes:
            for batch in batches:
                rows = batch * shape.tokens
                yield Product("linear_act", dtype, rows, 3 * dim, dim)
                yield Product("linear_act", dtype, rows, hidden, dim)
                yield Product("linear_residual", dtype, rows, dim, dim)
                yield Product("linear_residual", dtype, rows, dim, hidden)


def why_not() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    return "; ".join(_extension.why_not_cuda() or _sm90.why_not_built())


def calls(product: Product) -> dict[str, Callable[[], object]]:
    """Tile -> one call of the product with it."""
    ops, dtype = torch.ops.fastvit_cuda, getattr(torch, product.dtype)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype)

    x, bias = draw(product.rows, product.depth), draw(product.cols)
    weight = draw(product.cols, product.depth)
    residual = draw(product.rows, product.cols) if product.op == "linear_residual" else None

    def call(tile: str) -> object:
        if product.op == "linear_act":
            return ops.linear_act(x, weight, bias, *product.finish, tile)
        return ops.linear_residual(x, weight, bias, residual, bias, None, tile)

    return {tile.name: lambda name=tile.name: call(name) for tile in _tiles.TILES[product.op]}


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """CALLS calls as a graph, for with few rows the host takes longer to launch a kernel than it runs."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def medians(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds a call; the candidates take turns in every round."""
    graphs = {name: captured(call) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(ROUNDS + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 0:  # the first round warms up
                times[name].append(start.elapsed_time(end) * 1000 / CALLS)
    return {name: statistics.median(samples) for name, samples in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="base,large", help="of fastvit.testing.VIT_SHAPES; default: %(default)s")
    parser.add_argument("--batches", default="1,8,64,256", help="default: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16,float16", help="default: %(default)s")
    args = parser.parse_args()
    unknown = [name for name in args.models.split(",") if name not in VIT_SHAPES]
    if unknown:
        parser.error(f"--models has {unknown[0]!r}, expected some of {', '.join(VIT_SHAPES)}")
    reason = why_not()
    if reason:
        print(f"tune_mlp: nothing can be timed: {reason}", file=sys.stderr)
        return 3
    batches = [int(batch) for batch in args.batches.split(",")]
    best: dict[tuple, str] = {}
    for product in products(args.models.split(","), batches, args.dtypes.split(",")):
        times = medians(calls(product))
        key = (product.op, product.dtype, product.rows, product.cols, product.depth)
        best[key] = min(times, key=lambda name: times[name])
        print("#", *key, {name: round(time, 1) for name, time in times.items()}, file=sys.stderr)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("TIMED: dict[tuple[str, str, int, int, int], str] = {")
    for key, name in best.items():
        print(f"    {key}: {name!r},".replace("'", '"'))
    print("}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
