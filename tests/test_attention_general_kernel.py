"""Triton attention with options: masks, causal order, dropout. Needs CUDA or TRITON_INTERPRET=1.

As in test_attention_kernel.py the grid is a cross: every form of mask, dtype and pair of lengths appears once or twice.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from fastvit import ops, reference
from fastvit.dispatch import Unsupported, use_backend
from fastvit.ops import _heads
from fastvit.testing import assert_as_accurate, cast_inputs, run_with_gradients, sliced

pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels._configs import Limits

from fastvit.kernels import attention_general as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET=1"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def heads(batch, num_heads, queries, keys, dim, dtype):
    sizes = {"q": queries, "k": keys, "v": keys}
    return {
        name: torch.randn(batch, num_heads, size, dim).to(DEVICE, dtype).requires_grad_()
        for name, size in sizes.items()
    }


def stock(q, k, v, attn_mask=None, is_causal=False, dropout_p=0.0, dropout_seed=None, scale=None):
    """SDPA where it has the options, in the dtype of q; it gives NaN or zeros to a masked row by its own choice."""
    if dropout_p or is_causal:
        return reference.attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p, dropout_seed=dropout_seed,
            scale=scale,
        )  # fmt: skip
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        # in full: on a GPU, stock given a mask broadcast along the keys made this fail
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2]).contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale)


def assert_parity(inputs, **options):
    """The output and every gradient against float64; with dropout the mask that the seed names."""
    exact_options = dict(options)
    if options.get("dropout_p"):
        torch.manual_seed(7)
        exact_options["dropout_seed"] = torch.randint(2**63 - 1, (1,), device=DEVICE)
        torch.manual_seed(7)
    dout = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["q"])
    ours = run_with_gradients(lambda **t: ops.attention(**t, **options), inputs, dout)
    eager = run_with_gradients(lambda **t: stock(**t, **exact_options), inputs, dout)
    exact_inputs = cast_inputs(inputs, torch.float64)
    exact = run_with_gradients(lambda **t: reference.attention(**t, **exact_options), exact_inputs, dout)
    for name, value in ours.items():
        assert_as_accurate(value, eager[name].nan_to_num(), exact[name], name)
    return ours


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1, 45), (1, 2, 1, 45), (1, 1, 37, 1), (37, 45), (2, 2, 37, 45)], ids=str)
def test_boolean_masks(shape, dtype):
    mask = torch.rand(shape, device=DEVICE) > 0.3
    mask[..., 0] = True
    assert_parity(heads(2, 2, 37, 45, 32, dtype), attn_mask=mask)


@pytest.mark.parametrize(
    ("shape", "dtype", "mask_dtype"),
    [((2, 1, 1, 45), FP32, FP32), ((2, 37, 45), BF16, BF16), ((2, 37, 1), BF16, FP32), ((45,), FP16, FP16),
     ((2, 2, 37, 45), FP32, torch.float64)],
    ids=str,
)  # fmt: skip
def test_additive_masks(shape, dtype, mask_dtype):
    mask = torch.randn(shape).to(DEVICE, mask_dtype)
    mask[torch.rand(shape) < 0.2] = float("-inf")
    mask[..., 0] = 0.0
    assert_parity(heads(2, 2, 37, 45, 32, dtype), attn_mask=mask)


@pytest.mark.parametrize(("dtype", "dim"), [(FP32, 64), (BF16, 80), (FP16, 40), (BF16, 128)], ids=str)
def test_key_padding_over_several_blocks(dtype, dim):
    keys = torch.arange(197, device=DEVICE)
    mask = (keys < torch.tensor([70, 197], device=DEVICE).view(2, 1, 1, 1)) & (keys >= 0)
    assert_parity(heads(2, 1, 33, 197, dim, dtype), attn_mask=mask)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(70, 33), (33, 150), (140, 140)], ids=str)
def test_causal(queries, keys, dtype):
    assert_parity(heads(1, 1, queries, keys, 64, dtype), is_causal=True)


def test_the_first_query_sees_one_key():
    """It takes all the weight, so q and k get no gradient, up to the rounding of dout v^T - delta."""
    inputs = heads(2, 2, 1, 20, 64, FP32)
    ours = run_with_gradients(lambda **t: ops.attention(**t, is_causal=True), inputs)
    assert torch.equal(ours["output"], inputs["v"][:, :, :1])
    assert not ours["grad_v"][:, :, 1:].any()
    assert torch.equal(ours["grad_v"][:, :, 0], torch.ones_like(ours["grad_v"][:, :, 0]))
    assert max(ours["grad_q"].abs().max(), ours["grad_k"].abs().max()) < 1e-5


def test_one_query_with_a_mask_and_causal_order():
    """The class token's row alone, in the smallest and in an odd size, with both options at once."""
    assert_parity(heads(2, 2, 1, 197, 64, BF16), attn_mask=torch.rand(2, 1, 1, 197, device=DEVICE) > 0.5)
    mask = torch.rand(21, 21, device=DEVICE) > 0.4
    mask.fill_diagonal_(True)
    assert_parity(heads(1, 2, 21, 21, 32, FP32), attn_mask=mask, is_causal=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_a_query_without_keys_gives_zeros_and_takes_no_gradient(kind, dtype):
    mask = torch.rand(1, 1, 40, 70, device=DEVICE) > 0.5
    mask[..., 5, :] = mask[..., 39, :] = False
    mask[..., 7, :68] = False  # its only keys are in the last block
    mask[..., 7, 68:] = True
    if kind == "-inf":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf"))
    ours = assert_parity(heads(1, 2, 40, 70, 32, dtype), attn_mask=mask)
    for row in (5, 39):
        assert not ours["output"][:, :, row].any()
        assert not ours["grad_q"][:, :, row].any()


def test_no_key_for_anyone():
    inputs = heads(1, 1, 5, 9, 32, FP32)
    mask = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    for value in run_with_gradients(lambda **t: ops.attention(**t, attn_mask=mask), inputs).values():
        assert not value.any()


@pytest.mark.parametrize("value", [-1e4, torch.finfo(FP32).min])
def test_a_row_masked_by_a_large_number_spreads_evenly(value):
    """Stock says so, and so do its gradients: log(keys) must not be lost beside the mask."""
    mask = torch.zeros(1, 1, 9, 40, device=DEVICE)
    mask[..., 3, :] = value
    assert_parity(heads(1, 1, 9, 40, 32, FP32), attn_mask=mask)


def test_masks_of_any_strides_and_sliced_inputs():
    mask = torch.rand(45, 37, 2, device=DEVICE).permute(2, 1, 0)[:, None] > 0.3
    mask[..., 0] = True
    inputs = heads(2, 2, 37, 45, 64, BF16)
    assert_parity({name: sliced(t) for name, t in inputs.items()}, attn_mask=mask)


def test_a_broadcast_mask_takes_no_memory():
    mask = torch.rand(3, 1, 1, 50) > 0.5
    read = kernels.Options(0.125, attn_mask=mask).readable().attn_mask
    assert read.data_ptr() == mask.data_ptr()
    assert kernels._mask_strides(read, (3, 4, 50, 50)) == (50, 0, 0, 1)


@pytest.mark.parametrize(("dtype", "queries", "keys"), [(FP32, 37, 45), (BF16, 37, 150), (FP16, 130, 20)], ids=str)
def test_dropout_is_the_reference_with_the_same_seed(dtype, queries, keys):
    assert_parity(heads(2, 2, queries, keys, 32, dtype), dropout_p=0.3)


def test_dropout_with_every_other_option():
    mask = torch.randn(2, 1, 40, 40, device=DEVICE)
    assert_parity(heads(2, 2, 40, 40, 80, BF16), attn_mask=mask, is_causal=True, dropout_p=0.2)


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize(("dim", "dtype"), [(64, BF16), (96, BF16), (40, FP32)], ids=str)
def test_the_tiles_of_other_devices(monkeypatch, arch, dim, dtype):
    monkeypatch.setattr(kernels, "limits", lambda device: Limits.of_arch(arch))
    mask = torch.rand(1, 1, 70, 75, device=DEVICE) > 0.3
    assert_parity(heads(1, 1, 70, 75, dim, dtype), attn_mask=mask, dropout_p=0.2)


def test_dropout_of_a_packed_projection():
    qkv = torch.randn(2, 21, 3 * 64, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        with use_backend(backend):
            fn = lambda qkv: ops.attention_packed(qkv, 2, dropout_p=0.4)  # noqa: E731
            results.append(run_with_gradients(fn, {"qkv": qkv}))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


def test_packed_dropout_is_an_op_like_any_other():
    qkv = torch.randn(2, 9, 3 * 32, device=DEVICE, requires_grad=True)
    seed = torch.tensor([5], device=DEVICE)
    overload = torch.ops.fastvit.attention_general_packed_fwd.default
    torch.library.opcheck(overload, (qkv, *_heads.Flat(), 1, 0.2, seed, 0.125, "triton"))

    def second(qkv):
        torch.manual_seed(0)
        output = ops.attention_packed(qkv, 1, dropout_p=0.3)
        (grad,) = torch.autograd.grad(output.square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), qkv)[0]

    ours = second(qkv)
    with use_backend("reference"):
        assert_as_accurate(ours, second(qkv), second(qkv.detach().double().requires_grad_()))


def weights_of(dropout_p, seed, size=(2, 3, 64, 128)):
    """The weights that an attention with equal scores uses, through v = one-hot keys, times the number of keys."""
    batch, num_heads, queries, keys = size
    zeros = torch.zeros(batch, num_heads, queries, keys, device=DEVICE)
    v = torch.eye(keys, device=DEVICE).expand(batch, num_heads, keys, keys)
    torch.manual_seed(seed)
    return ops.attention(zeros, torch.zeros_like(v), v, dropout_p=dropout_p) * keys


def test_dropout_statistics():
    """Of 49 k weights: the share kept within 5 standard deviations, for every head, query and key alike."""
    kept = weights_of(0.25, seed=0)
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.75], device=DEVICE))
    kept = (kept > 0).double()
    for dims in ((0, 1, 2, 3), (2, 3), (1, 3), (1, 2)):
        count = kept.numel() / kept.mean(dims).numel()
        worst = (kept.mean(dims) - 0.75).abs().max().item()
        assert worst < 5 * (0.25 * 0.75 / count) ** 0.5
    neighbours = kept - 0.75
    for axis in (2, 3):  # weights side by side are independent
        pairs = neighbours.narrow(axis, 1, kept.shape[axis] - 1) * neighbours.narrow(axis, 0, kept.shape[axis] - 1)
        assert pairs.mean().abs() < 5 * 0.25 * 0.75 / pairs.numel() ** 0.5
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[:, 0], kept[:, 1])


def test_dropout_follows_the_generator():
    size = (1, 1, 16, 32)
    first, again, other = (weights_of(0.5, seed, size) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_dropout_is_the_plain_call():
    inputs = heads(1, 2, 21, 21, 32, FP32)
    plain = run_with_gradients(ops.attention, inputs)
    zero = run_with_gradients(lambda **t: ops.attention(**t, dropout_p=0.0), inputs)
    assert all(torch.equal(zero[name], plain[name]) for name in plain)


def test_same_bits_every_run():
    inputs, mask = heads(1, 1, 70, 70, 64, BF16), torch.randn(70, device=DEVICE)
    first, second = (run_with_gradients(lambda **t: ops.attention(**t, attn_mask=mask), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_images():
    mask = torch.ones(5, dtype=torch.bool, device=DEVICE)
    for value in run_with_gradients(
        lambda **t: ops.attention(**t, attn_mask=mask), heads(0, 2, 5, 5, 32, FP32)
    ).values():
        assert value.shape == (0, 2, 5, 32)


def test_opcheck():
    inputs = heads(2, 2, 5, 7, 32, FP32)
    mask = torch.rand(2, 1, 1, 7, device=DEVICE) > 0.2
    overload = torch.ops.fastvit.attention_general_fwd.default
    seed = torch.tensor([5], device=DEVICE)
    torch.library.opcheck(overload, (*inputs.values(), *_heads.Flat(), mask, True, 0.2, seed, 0.125, "triton"))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.3}, {"attn_mask": None}], ids=str)
def test_compiles_whole_with_its_backward(options):
    torch.compiler.reset()
    if "attn_mask" in options:
        options = {"attn_mask": torch.rand(2, 1, 1, 9, device=DEVICE) > 0.2}
    inputs = heads(2, 1, 9, 9, 32, FP32)
    results = []
    for fn in (ops.attention, torch.compile(ops.attention, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(run_with_gradients(lambda fn=fn, **t: fn(**t, **options), inputs))
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name])


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.3}, {"attn_mask": True}], ids=str)
def test_double_backward_is_the_reference(options):
    if "attn_mask" in options:
        options = {"attn_mask": torch.randn(2, 1, 1, 9, device=DEVICE)}

    def second(inputs):
        leaves = list(inputs.values())
        torch.manual_seed(0)
        output = ops.attention(**inputs, **options)
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    inputs = heads(2, 1, 9, 9, 32, FP32)
    ours = second(inputs)
    with use_backend("reference"):
        eager, exact = second(inputs), second(cast_inputs(inputs, torch.float64))
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_as_accurate(a, b, c)


def test_a_mask_that_asks_for_a_gradient_is_refused():
    mask = torch.zeros(9, device=DEVICE, requires_grad=True)
    with pytest.raises(Unsupported, match="attn_mask requires a gradient, triton gives none"):
        ops.attention(**heads(1, 1, 9, 9, 32, FP32), attn_mask=mask)
    with use_backend("auto"):
        ops.attention(**heads(1, 1, 9, 9, 32, FP32), attn_mask=mask).sum().backward()
    assert mask.grad is not None


def ragged(lengths, num_heads, dim, dtype):
    """q, k, v as views of one packed (T, 3, H, D) tensor, and the arguments that say where samples begin."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    qkv = torch.randn(sum(lengths), 3, num_heads, dim).to(DEVICE, dtype)
    inputs = {name: t.detach().requires_grad_() for name, t in zip("qkv", qkv.unbind(1), strict=True)}
    return inputs, {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths, default=1)}


@pytest.mark.parametrize(
    ("lengths", "dim", "dtype", "options"),
    [
        ([50, 1, 0, 37, 130], 64, BF16, {}),
        ([50, 1, 0, 37, 65], 32, FP32, {}),
        ([20, 33], 80, FP16, {}),
        ([70, 9, 33], 64, FP32, {"is_causal": True}),
        ([21, 40], 32, BF16, {"dropout_p": 0.25}),
    ],
    ids=str,
)
def test_ragged_batches(lengths, dim, dtype, options):
    inputs, where = ragged(lengths, 2, dim, dtype)
    dout = torch.randn(inputs["q"].shape).to(inputs["q"])
    results = []
    for tensors, backend in (
        (inputs, "triton"),
        (inputs, "reference"),
        (cast_inputs(inputs, torch.float64), "reference"),
    ):
        torch.manual_seed(5)
        with use_backend(backend):
            fn = lambda **t: ops.attention_varlen(**t, **where, **options)  # noqa: E731
            results.append(run_with_gradients(fn, tensors, dout))
    for name, value in results[0].items():
        assert_as_accurate(value, results[1][name], results[2][name], name)


def test_a_sample_of_a_ragged_batch_is_attention_alone():
    """Its neighbours, even of NaN, and its place do not matter; nor does a packed row's other content."""
    inputs, where = ragged([20, 33, 9], 2, 32, FP32)
    with torch.no_grad():
        for tensor in inputs.values():
            tensor[:20] = tensor[53:] = float("nan")
    ours = run_with_gradients(lambda **t: ops.attention_varlen(**t, **where), inputs)
    alone = {name: t.detach()[20:53].transpose(0, 1)[None].requires_grad_() for name, t in inputs.items()}
    expected = run_with_gradients(ops.attention, alone)
    for name, value in ours.items():
        torch.testing.assert_close(value[20:53], expected[name][0].transpose(0, 1))


def test_no_samples():
    inputs, where = ragged([], 2, 32, FP32)
    for value in run_with_gradients(lambda **t: ops.attention_varlen(**t, **where), inputs).values():
        assert value.shape == (0, 2, 32)


def test_opcheck_of_ragged_batches():
    inputs, where = ragged([5, 3], 2, 32, FP32)
    seed = torch.tensor([5], device=DEVICE)
    overload = torch.ops.fastvit.attention_varlen_fwd.default
    torch.library.opcheck(
        overload, (*inputs.values(), *_heads.Flat(), *where.values(), True, 0.2, seed, 0.125, "triton")
    )


def test_index_arithmetic_past_two_to_the_31():
    """Rows 2^26 elements apart, hardly any memory: the last sample, and the last row of the mask, lie past 2^31."""
    gap, rows = 2**26, 45
    buffer = torch.empty(gap * rows, dtype=BF16, device=DEVICE)
    qkv = buffer.as_strided((rows, 3, 1, 32), (gap, 32, 32, 1)).copy_(torch.randn(rows, 3, 1, 32))
    inputs = {name: t.detach().requires_grad_() for name, t in zip("qkv", qkv.unbind(1), strict=True)}
    where = {"cu_seqlens": torch.tensor([0, 20, 40, rows], device=DEVICE), "max_seqlen": 20}
    near = {name: t.detach().contiguous().requires_grad_() for name, t in inputs.items()}
    assert_same(lambda **t: ops.attention_varlen(**t, **where), inputs, near)

    mask = buffer.as_strided((rows, rows), (gap, 1)).fill_(0.0)
    mask[40, ::2] = float("-inf")
    inputs = heads(1, 1, rows, rows, 32, FP32) | {"attn_mask": mask}
    assert_same(ops.attention, inputs, inputs | {"attn_mask": mask.clone(memory_format=torch.contiguous_format)})


def assert_same(fn, inputs, others):
    ours, expected = run_with_gradients(fn, inputs), run_with_gradients(fn, others)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
