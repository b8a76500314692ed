"""Ragged batches on the CPU, in place: each sample as if it were alone, whatever lies beside it."""

import importlib

import cpp_ops
import pytest
import torch

from fastvit import ops
from fastvit.dispatch import Unsupported, recording, use_backend
from fastvit.ops import _heads
from fastvit.reference import HeadNorm, Rope
from fastvit.testing import assert_op_as_accurate, run_with_gradients, sliced

C = cpp_ops.C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [5, 0, 1, 70, 197, 33, 2]


def attention_varlen(**inputs):
    cpp_ops.poison()
    with use_backend("cpp"):
        return ops.attention_varlen(**inputs)


def make(lengths, heads=3, dim=40, dtype=torch.float32, scale=1.0):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rows = {name: (torch.randn(sum(lengths), heads, dim) * scale).to(dtype).requires_grad_() for name in "qkv"}
    return {**rows, "cu_seqlens": bounds, "max_seqlen": max([1, *lengths])}


def check(inputs, **options):
    assert_op_as_accurate("attention_varlen", attention_varlen, {**inputs, **options})


def samples_of(results, lengths):
    split = {name: value.split(lengths) for name, value in results.items()}
    return [{name: rows[sample] for name, rows in split.items()} for sample in range(len(lengths))]


def same_bits(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [MIXED, [300], [64, 128], [17, 600, 3]], ids=str)
def test_lengths(lengths, dtype, is_causal):
    check(make(lengths, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_one_row(dtype):
    """One key takes all the weight, so q and k get no gradient, up to the rounding of dout v^T - delta."""
    inputs = make([1, 0, 1, 1], dtype=dtype)
    dout = torch.randn(3, 3, 40).to(dtype)
    results = run_with_gradients(attention_varlen, inputs, dout)
    assert torch.equal(results["output"], inputs["v"])
    assert torch.equal(results["grad_v"], dout)
    assert max(results["grad_q"].abs().max(), results["grad_k"].abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33, 64, 72, 128])
def test_head_dims(dim, dtype):
    check(make([37, 0, 50], heads=2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_magnitude(dtype):
    check(make([50, 7], dim=64, dtype=dtype, scale=10.0))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_layouts(index_dtype):
    inputs = make(MIXED)
    rows = {name: sliced(inputs[name]) for name in "qkv"}
    check({**inputs, **rows, "cu_seqlens": inputs["cu_seqlens"].to(index_dtype)})
    turned = {name: inputs[name].detach().transpose(0, 2).contiguous().transpose(0, 2) for name in "qkv"}
    check({**inputs, **{name: value.requires_grad_() for name, value in turned.items()}})
    strided = torch.stack([inputs["cu_seqlens"], inputs["cu_seqlens"]], dim=1)[:, 0]
    same_bits(run_with_gradients(attention_varlen, {**inputs, "cu_seqlens": strided}),
              run_with_gradients(attention_varlen, inputs))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_rows_are_read_in_place(dtype):
    inputs = make(MIXED, dtype=dtype)
    packed = torch.stack([inputs.pop(name).detach() for name in "qkv"], dim=1).requires_grad_()

    def attend(qkv, **rest):
        return attention_varlen(**dict(zip("qkv", qkv.unbind(1), strict=True)), **rest)

    ours = run_with_gradients(attend, {"qkv": packed, **inputs})
    rows = {name: value.contiguous() for name, value in zip("qkv", packed.detach().unbind(1), strict=True)}
    apart = run_with_gradients(attention_varlen, {n: v.requires_grad_() for n, v in rows.items()} | inputs)
    assert torch.equal(ours["output"], apart["output"])
    assert torch.equal(ours["grad_qkv"], torch.stack([apart[f"grad_{name}"] for name in "qkv"], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_written_in_place_and_nowhere_else(dtype):
    bounds = torch.tensor([0, 1, 1, 30, 37])
    q, k, v = torch.randn(37, 3, 2, 24).to(dtype).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
    buffer = torch.full((39, 3, 2, 32), float("nan")).to(dtype)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[1:38, :, :, :24] = True
    out, *statistics = C.attention_general_fwd(q, k, v, *_heads.Flat(), None, False, 0.0, None, 0.2, bounds)
    grads = buffer[1:38, :, :, :24].permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
    C.attention_general_bwd(
        torch.randn_like(q), q, k, v, out, *statistics, *_heads.Flat(), None, False, 0.0, None, 0.2, bounds, *grads
    )
    assert torch.equal(torch.isnan(buffer), ~inside)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_is_what_dense_attention_makes_of_it(dtype, is_causal):
    """Bit for bit, so that nothing beside a sample shows in it."""
    inputs = make(MIXED, dtype=dtype)
    together = run_with_gradients(attention_varlen, inputs | {"is_causal": is_causal})
    rows = samples_of({name: inputs[name].detach() for name in "qkv"}, MIXED)
    for sample, expected in zip(rows, samples_of(together, MIXED), strict=True):
        if not sample["q"].numel():
            continue
        dense = {name: value.transpose(0, 1).unsqueeze(0).requires_grad_() for name, value in sample.items()}
        with use_backend("cpp"):
            alone = run_with_gradients(ops.attention, {**dense, "is_causal": is_causal})
        same_bits({name: value[0].transpose(0, 1) for name, value in alone.items()}, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_lies_beside_a_sample_does_not_show(dtype, poison):
    inputs = make([70, 33, 40], dtype=dtype)
    clean = run_with_gradients(attention_varlen, inputs)
    for name in "qkv":
        inputs[name].data[:70] = poison
        inputs[name].data[103:] = poison
    for name, value in run_with_gradients(attention_varlen, inputs).items():
        assert torch.equal(value[70:103], clean[name][70:103]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [MIXED, [2], [500, 1, 1]], ids=str)
def test_bits_do_not_depend_on_threads(lengths, dtype):
    """Also with more threads than there is work."""
    inputs = make(lengths, heads=2, dtype=dtype)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 9):
        torch.set_num_threads(threads)
        try:
            results.append(run_with_gradients(attention_varlen, inputs))
        finally:
            torch.set_num_threads(before)
    same_bits(results[1], results[0])
    same_bits(results[2], results[0])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_nothing_to_attend(lengths):
    results = run_with_gradients(attention_varlen, make(lengths))
    assert all(value.shape == (0, 3, 40) for value in results.values())


@pytest.mark.parametrize("rms", [False, True])
def test_norms_and_rotation(rms):
    inputs = make([33, 0, 50], heads=2, dim=32)
    weights = {name: torch.rand(32) + 0.5 for name in ("q_norm", "k_norm")}
    norms = {name: HeadNorm(weight, None, 1e-6, rms) for name, weight in weights.items()}
    check(inputs, **norms, rope=Rope(torch.randn(83, 64), half=True))


def test_weights_of_norms_get_gradients():
    inputs = make([33, 5], heads=2, dim=32)
    weight = torch.rand(32, requires_grad=True)

    def attend(weight, **rest):
        return attention_varlen(**rest, q_norm=HeadNorm(weight), k_norm=HeadNorm(weight * 0.5))

    ours = run_with_gradients(attend, {"weight": weight, **inputs})
    with use_backend("reference"):
        expected = run_with_gradients(
            lambda weight, **rest: ops.attention_varlen(**rest, q_norm=HeadNorm(weight), k_norm=HeadNorm(weight * 0.5)),
            {"weight": weight, **inputs},
        )
    torch.testing.assert_close(ours["grad_weight"], expected["grad_weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(monkeypatch, dtype, is_causal):
    """The reference with the same seed, which counts the queries and keys of each sample from 0."""
    module = importlib.import_module("fastvit.ops.attention_varlen")

    def attend(dropout_seed, **inputs):
        monkeypatch.setattr(module, "draw_seed", lambda device: dropout_seed)
        return attention_varlen(**inputs)

    options = {"dropout_p": 0.3, "dropout_seed": torch.tensor([5]), "is_causal": is_causal}
    assert_op_as_accurate("attention_varlen", attend, make(MIXED, dtype=dtype) | options)


def test_it_runs_by_itself():
    with recording() as calls:
        ops.attention_varlen(**make(MIXED))
    assert [backend for _, backend, *_ in calls] == ["cpp"]


def test_refusals():
    inputs = make([5, 3])
    with pytest.raises(Unsupported, match=r"q is torch.float64, the kernels take float32"):
        attention_varlen(**{n: v.double() if n in "qkv" else v for n, v in inputs.items()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 2, 5, 16), "k": torch.zeros(2, 2, 5, 16), "v": torch.zeros(2, 2, 5, 16)},
         r"q has shape \(2, 2, 5, 16\) and k has shape .* expected \(1, H, T, D\) for both"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "attn_mask is given, expected none with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens goes from 0 to 4, expected 0 to 5 without falling"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "cu_seqlens goes from 0 to 5, expected 0 to 5 without falling"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens is Float \(2,\) on cpu, expected int32 or int64"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens is Long \(1, 2\) on cpu, expected int32 or int64"),
    ],
)  # fmt: skip
def test_errors(changed, message):
    inputs = {name: torch.zeros(1, 2, 5, 16) for name in "qkv"} | {"attn_mask": None, "is_causal": False}
    inputs |= {"dropout_p": 0.0, "dropout_seed": None, "scale": 1.0, "cu_seqlens": torch.tensor([0, 5])}
    inputs |= _heads.Flat()._asdict()
    with pytest.raises(ValueError, match=message):
        C.attention_general_fwd(**(inputs | changed))


def test_backward_errors():
    q, bounds = torch.zeros(1, 2, 5, 16), torch.tensor([0, 5])
    out, shifts, sums = C.attention_general_fwd(q, q, q, *_heads.Flat(), None, False, 0.0, None, 1.0, bounds)

    def backward(shifts=shifts, bounds=bounds):
        grads = (torch.zeros_like(q) for _ in range(3))
        C.attention_general_bwd(
            q, q, q, q, out, shifts, sums, *_heads.Flat(), None, False, 0.0, None, 1.0, bounds, *grads
        )

    with pytest.raises(ValueError, match=r"shifts has shape \(1, 2, 4\), expected \(1, 2, 5\) like q"):
        backward(shifts=shifts[..., :4])
    with pytest.raises(ValueError, match="cu_seqlens goes from 0 to 9, expected 0 to 5"):
        backward(bounds=torch.tensor([0, 9]))
