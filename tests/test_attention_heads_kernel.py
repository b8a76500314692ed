"""Triton attention on normalised and rotated q and k. Needs CUDA or TRITON_INTERPRET=1.

As in test_attention_kernel.py the grid is a cross: every kind of norm, layout of a rotation, dtype and way to cut a
head dim appears, each pair of them does not.
"""

import os

import pytest
import torch

from fastvit import ops, reference
from fastvit.dispatch import Unsupported, use_backend
from fastvit.ops import _heads
from fastvit.reference import HeadNorm, Rope
from fastvit.testing import assert_as_accurate, cast_inputs, run_with_gradients, sliced

pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels._configs import Limits

from fastvit.kernels import attention_general as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET=1"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NORMS = ("q_weight", "q_bias", "k_weight", "k_bias")


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def heads(batch, num_heads, queries, keys, dim, dtype, norm="layer", weight_dtype=None):
    """q, k, v and the weights of two norms, all asking for gradients."""
    sizes = {"q": (batch, num_heads, queries, dim), "k": (batch, num_heads, keys, dim)}
    values = {name: torch.randn(size) for name, size in (sizes | {"v": sizes["k"]}).items()}
    if norm:
        names = NORMS if norm == "layer" else NORMS[::2]
        values |= {name: 0.3 * torch.randn(dim) + (1.0 if "weight" in name else 0.0) for name in names}
    dtypes = {name: weight_dtype if name in NORMS and weight_dtype else dtype for name in values}
    return {name: value.to(DEVICE, dtypes[name]).requires_grad_() for name, value in values.items()}


def table(tokens, dim, *leading):
    """Sines and cosines of random angles, another one for every column, which is more than a rotation asks for."""
    angles = torch.randn(*leading, tokens, dim) * 3
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(DEVICE)


def calling(fn, norm, rope, **options):
    """``fn`` of q, k, v (or qkv) and the norms' weights by name."""

    def call(q_weight=None, q_bias=None, k_weight=None, k_bias=None, **rows):
        norms = {}
        if norm:
            norms["q_norm"] = HeadNorm(q_weight, q_bias, 1e-6, norm == "rms")
            norms["k_norm"] = HeadNorm(k_weight, k_bias, 1e-5, norm == "rms")
        wide = rope
        if rope is not None and next(iter(rows.values())).dtype == torch.float64:
            wide = rope._replace(table=rope.table.double())
        return fn(**rows, **norms, rope=wide, **options)

    return call


def assert_parity(inputs, norm="layer", rope=None, name="attention", **options):
    meaning = calling(getattr(reference, name), norm, rope, **options)
    ours = run_with_gradients(calling(getattr(ops, name), norm, rope, **options), inputs, grad_like(meaning, inputs))
    eager = run_with_gradients(meaning, inputs, grad_like(meaning, inputs))
    exact = run_with_gradients(meaning, cast_inputs(inputs, torch.float64), grad_like(meaning, inputs))
    for key, value in ours.items():
        assert_as_accurate(value, eager[key], exact[key], key)
    return ours


def grad_like(fn, inputs):
    with torch.no_grad():
        out = fn(**inputs)
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


@pytest.mark.parametrize(
    ("dim", "dtype", "norm", "half"),
    [(64, FP32, "layer", True), (64, BF16, "layer", False), (72, BF16, "rms", True), (80, FP16, "layer", True),
     (40, FP32, "rms", False), (128, BF16, "", True), (96, BF16, "layer", None), (56, FP32, "layer", None)],
    ids=str,
)  # fmt: skip
def test_norms_and_rotations(dim, dtype, norm, half):
    rope = None if half is None else Rope(table(44, dim), 1, half)
    inputs = heads(2, 2, 37, 45, dim, dtype, norm)
    if rope is None:  # a bias on every key moves all scores of a query alike: its gradient is zero but for noise
        inputs.pop("k_bias")
    assert_parity(inputs, norm, rope)


@pytest.mark.parametrize(("dim", "half"), [(72, True), (80, False), (96, True)], ids=str)
def test_the_tiles_before_hopper(monkeypatch, dim, half):
    """There a head is held in one pair of parts, with padding in both."""
    monkeypatch.setattr(kernels, "limits", lambda device: Limits.of_arch(80))
    assert_parity(heads(1, 1, 37, 45, dim, BF16), rope=Rope(table(44, dim), 1, half))


def test_a_bias_on_every_key_takes_no_gradient_without_a_rotation():
    ours = run_with_gradients(calling(ops.attention, "layer", None), heads(1, 2, 9, 9, 32, FP32))
    assert ours["grad_k_bias"].abs().max() < 1e-4 * ours["grad_q_weight"].abs().max()


@pytest.mark.parametrize("half", [True, False])
def test_over_several_blocks_of_queries_and_keys(half):
    assert_parity(heads(1, 1, 150, 150, 32, BF16), rope=Rope(table(145, 32), 5, half))


@pytest.mark.parametrize("leading", [(2,), (2, 1), (2, 2), (1, 2)], ids=str)
def test_tables_of_a_head_or_a_sample(leading):
    assert_parity(heads(2, 2, 9, 9, 32, FP32), rope=Rope(table(9, 32, *leading), 0, True))


def test_a_table_in_half_precision_or_a_view_of_a_larger_one():
    inputs = heads(1, 2, 9, 9, 32, FP32)
    large = table(20, 48)
    view = large[3:11, 7:71]
    assert_parity(inputs, rope=Rope(view, 1))
    assert_parity(inputs, rope=Rope(view.bfloat16(), 1, True))


def test_norms_without_weights_and_of_another_dtype():
    assert_parity({n: t for n, t in heads(1, 2, 21, 21, 32, FP32).items() if n not in NORMS})
    assert_parity(heads(1, 2, 21, 21, 40, BF16, "rms", weight_dtype=FP32), "rms")


def test_masks_causal_order_and_sliced_inputs():
    mask = torch.rand(2, 1, 21, 33, device=DEVICE) > 0.4
    mask[..., 0] = True
    inputs = heads(2, 1, 21, 33, 64, BF16)
    inputs = {name: sliced(t) if t.dim() == 4 else t for name, t in inputs.items()}
    assert_parity(inputs, rope=Rope(table(30, 64), 3, True), attn_mask=mask, is_causal=True)


def test_a_query_without_keys_takes_no_gradient():
    mask = torch.ones(7, 9, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    ours = assert_parity(heads(1, 1, 7, 9, 32, FP32), rope=Rope(table(9, 32)), attn_mask=mask)
    assert not ours["output"][:, :, 2].any()
    assert not ours["grad_q"][:, :, 2].any()


def with_seed(fn):
    """``fn`` after seeding PyTorch's generator: the same dropout in every backend."""

    def call(**inputs):
        torch.manual_seed(3)
        return fn(**inputs)

    return call


def assert_same_as_reference(fn, inputs):
    fn, results = with_seed(fn), []
    exact = cast_inputs(inputs, torch.float64)
    for backend, tensors in (("triton", inputs), ("reference", inputs), ("reference", exact)):
        with use_backend(backend):
            results.append(run_with_gradients(fn, tensors, grad_like(fn, tensors)))
    for key, value in results[0].items():
        assert_as_accurate(value, results[1][key], results[2][key], key)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_packed_projection(dropout_p):
    weights = {name: t for name, t in heads(1, 1, 1, 1, 64, BF16).items() if name in NORMS}
    inputs = {"qkv": torch.randn(2, 37, 3 * 2 * 64).to(DEVICE, BF16).requires_grad_(), **weights}
    rope = Rope(table(36, 64), 1, True)
    assert_same_as_reference(calling(ops.attention_packed, "layer", rope, num_heads=2, dropout_p=dropout_p), inputs)


def test_a_ragged_batch():
    """Its table has a row for every row of the batch."""
    lengths = [20, 0, 33, 1]
    rows = {name: torch.randn(sum(lengths), 2, 40).to(DEVICE).requires_grad_() for name in "qkv"}
    weights = {name: t for name, t in heads(1, 1, 1, 1, 40, FP32).items() if name in NORMS}
    where = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(DEVICE), "max_seqlen": 33}
    rope = Rope(table(sum(lengths), 40, 2))
    assert_same_as_reference(calling(ops.attention_varlen, "layer", rope, **where), rows | weights)


def test_same_bits_every_run():
    inputs, rope = heads(1, 2, 70, 70, 64, BF16), Rope(table(69, 64), 1)
    first, second = (run_with_gradients(calling(ops.attention, "layer", rope), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_images():
    inputs = heads(0, 2, 5, 5, 32, FP32)
    ours = run_with_gradients(calling(ops.attention, "layer", Rope(table(5, 32))), inputs)
    assert ours["output"].shape == (0, 2, 5, 32)
    assert not any(ours[f"grad_{name}"].any() for name in NORMS)


def test_opcheck_and_fullgraph_compile():
    inputs, rope = heads(1, 2, 5, 7, 32, FP32), Rope(table(6, 32), 1)
    q, k, v, *weights = inputs.values()
    flat = _heads.flat(HeadNorm(*weights[:2]), HeadNorm(*weights[2:]), rope)
    overload = torch.ops.fastvit.attention_general_fwd.default
    torch.library.opcheck(overload, (q, k, v, *flat, None, False, 0.0, None, 0.2, "triton"))
    torch.compiler.reset()
    fn = calling(ops.attention, "layer", rope)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    expected = run_with_gradients(fn, inputs)
    for name, value in run_with_gradients(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name])


def test_double_backward_is_the_reference():
    fn = calling(ops.attention, "layer", Rope(table(8, 32), 1, True))

    def second(inputs):
        leaves = list(inputs.values())
        grads = torch.autograd.grad(fn(**inputs).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)

    inputs = heads(1, 1, 9, 9, 32, FP32)
    ours = second(inputs)
    with use_backend("reference"):
        eager, exact = second(inputs), second(cast_inputs(inputs, torch.float64))
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_as_accurate(a, b, c)


def test_refusals():
    inputs = {name: t for name, t in heads(1, 1, 5, 5, 32, FP32).items() if name not in NORMS}
    norm, wide = HeadNorm(), table(5, 32).requires_grad_()
    for reason, arguments in {
        "k_norm is None beside a norm of the other, triton takes both or none": {"q_norm": norm},
        "q_norm and k_norm are of different kinds": {"q_norm": norm, "k_norm": HeadNorm(rms=True)},
        "k_norm.eps is 0.0, triton takes one above 0": {"q_norm": norm, "k_norm": HeadNorm(eps=0.0)},
        "rope.table requires a gradient, triton gives none": {"rope": Rope(wide)},
    }.items():
        with pytest.raises(Unsupported, match=reason):
            ops.attention(**inputs, **arguments)
    with use_backend("auto"):
        ops.attention(**inputs, rope=Rope(wide)).sum().backward()
    assert wide.grad is not None


def test_a_table_is_read_where_it_lies():
    rope = table(5, 32).expand(2, 3, 5, 64)
    prepared = kernels.Preparation(rope=rope[0, 0]).readable()
    read, (stride_b, stride_h) = prepared.rope, prepared.numbers(2, 3)[:2]
    assert (read.data_ptr(), stride_b, stride_h) == (rope.data_ptr(), 0, 0)
