"""How much luck is in stock PyTorch's error:  python benchmarks/stock_against_stock.py [--orders 8] [--photos 19]

The trained ViT-S/14 on photos, float32, stock PyTorch only, its embedding channels in several orders: the same
mathematics. Each order is judged against each other one by the gates that a kernel is judged by, then each against the
worst of all the others. This is why the certificate of a whole model asks stock's error of several orders.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from itertools import permutations

import torch

from fastvit import create_model, data, parity
from fastvit.dispatch import use_backend
from fastvit.testing import Errors, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=parity.STOCK_RUNS)
    parser.add_argument("--photos", type=int, default=19)
    args = parser.parse_args()
    model = create_model(data.TRAINED_MODEL, img_size=224, num_classes=0, checkpoint_path=data.trained_vit()).eval()
    pictures = (data.open_picture(photo.path) for photo in data.photos()[: args.photos])
    images = data.normalize(data.preprocess(pictures, 224))
    with use_backend("reference"):
        exact = parity.output_and_gradients(copy.deepcopy(model).double(), images.double())
    runs = parity.stock_runs(model, images, exact, args.orders)

    pairs = [misses(runs[i], runs[j], exact) for i, j in permutations(range(len(runs)), 2)]
    print(f"{len(exact)} comparisons in each of {len(pairs)} pairs of orders, stock against stock")
    print(f"pairs with a miss: {sum(map(bool, pairs))}; misses a pair: {statistics.mean(map(len, pairs)):.1f}")
    print("worst, in units of the limit: {:.2f} ({})".format(*max(miss for pair in pairs for miss in pair)))
    left_out = [misses(run, parity.worst_of(runs[:i] + runs[i + 1 :]), exact) for i, run in enumerate(runs)]
    print(f"each against the worst of the other {len(runs) - 1}: misses {[len(found) for found in left_out]}")


def misses(run: dict[str, Errors], stock: dict[str, Errors], exact: dict) -> list[tuple[float, str]]:
    """What ``run`` misses by, in units of the limit."""
    found = []
    for key, value in run.items():
        result = judge(value, stock[key], exact[key], torch.float32)
        if not result.passed:
            found.append((max(result.max_error / result.max_limit, result.rms_error / result.rms_limit), key))
    return found


if __name__ == "__main__":
    main()
