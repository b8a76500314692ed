"""Floating-point operations and the fewest bytes of each op: what a measured time is divided by.

Bytes count every input and output once, plus intermediates too big for any cache: the MLP's hidden activation is
written once and read once. Weights count once. A multiply-add is two operations; only matrix products count.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..testing import Shape


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline: nothing runs faster than the larger of the two."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclass(frozen=True)
class _Table:
    """Forward operations, elements in and out, weight elements, and what the backward adds to them."""

    flops: float
    inputs: float
    outputs: float
    weights: float
    hidden: float = 0.0  # elements of the intermediate activation
    saved_output: bool = False  # the backward reads the output again
    backward_flops: float = 2.0  # times the forward's


def op_cost(op: str, shape: Shape, batch: int, itemsize: int, mode: str = "fwd") -> Cost:
    """Cost of ``op`` at ``make_inputs``' sizes; ``mode`` is "fwd", "bwd" or "full" (both)."""
    table = _tables(shape, batch)[op]
    forward = Cost(table.flops, itemsize * (table.inputs + table.outputs + table.weights + 2 * table.hidden))
    # reads inputs, weights, the output's gradient and the saved hidden; writes the gradients of inputs and weights;
    # the hidden's gradient is written once and read once
    moved = 2 * (table.inputs + table.weights) + table.outputs * (1 + table.saved_output) + 3 * table.hidden
    backward = Cost(table.flops * table.backward_flops, itemsize * moved)
    if mode == "fwd":
        return forward
    if mode == "bwd":
        return backward
    return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)


def _tables(shape: Shape, batch: int) -> dict[str, _Table]:
    dim, hidden, tokens = shape.embed_dim, shape.hidden_dim, shape.tokens
    rows = batch * tokens
    x = rows * dim
    patches = (shape.image_size // shape.patch_size) ** 2
    pixels = 3 * shape.patch_size**2
    attention = _Table(4.0 * batch * tokens * tokens * dim, 3 * x, x, 0, saved_output=True, backward_flops=2.5)
    lengths = (tokens,) * (-(-batch // 2)) + (tokens // 2,) * (batch // 2)
    ragged = sum(lengths) * dim
    pairs = float(sum(length * length for length in lengths))
    return {
        # no gradient of the images: training asks for none
        "patch_embed": _Table(
            2.0 * batch * patches * pixels * dim,
            batch * patches * pixels,
            x,
            (pixels + tokens + 1) * dim,
            backward_flops=1.0,
        ),
        "attention": attention,
        "attention_packed": attention,
        "attention_varlen": _Table(4.0 * pairs * dim, 3 * ragged, ragged, 0, saved_output=True, backward_flops=2.5),
        "layernorm_linear": _Table(2.0 * rows * dim * 3 * dim, x, 3 * x, 3 * dim * dim),
        "linear_residual": _Table(2.0 * rows * dim * dim, 2 * x, x, dim * dim),
        "layernorm_mlp": _Table(4.0 * rows * dim * hidden, 2 * x, x, 2 * dim * hidden, hidden=rows * hidden),
    }


def model_flops(shape: Shape, depth: int, batch: int, mode: str = "infer", num_classes: int = 1000) -> float:
    """Operations of a whole ViT; a training step ("train") counts three times the forward."""
    block = sum(
        op_cost(op, shape, batch, 1).flops
        for op in ("layernorm_linear", "attention", "linear_residual", "layernorm_mlp")
    )
    stem = op_cost("patch_embed", shape, batch, 1).flops
    head = 2.0 * batch * shape.embed_dim * num_classes
    return (3 if mode == "train" else 1) * (stem + depth * block + head)
