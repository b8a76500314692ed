"""Attention on the CPU against the reference: every mask, layout and dtype, forward and all gradients."""

import math
import os
import threading

import cpp_ops
import pytest
import torch

from fastvit import ops, reference
from fastvit.dispatch import Unsupported, use_backend
from fastvit.ops import _attention_general, _heads
from fastvit.testing import (
    assert_as_accurate,
    assert_op_as_accurate,
    cast_inputs,
    run_with_gradients,
    sliced,
)

C = cpp_ops.C

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]


def attention(**inputs):
    cpp_ops.poison()
    with use_backend("cpp"):
        return ops.attention(**inputs)


def attention_packed(**inputs):
    cpp_ops.poison()
    with use_backend("cpp"):
        return ops.attention_packed(**inputs)


def make(batch, heads, queries, keys, dim, dtype=FP32, scale=1.0):
    sizes = {"q": queries, "k": keys, "v": keys}
    return {
        name: (torch.randn(batch, heads, size, dim) * scale).to(dtype).requires_grad_() for name, size in sizes.items()
    }


def check(inputs, **options):
    """As accurate as the reference in its own dtype; a float mask follows the dtype, as stock PyTorch asks."""
    assert_op_as_accurate("attention", attention, {**inputs, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"), [(2, 2), (50, 50), (65, 65), (197, 197), (257, 257), (1, 197), (70, 33), (33, 300)], ids=str
)
def test_lengths(queries, keys, dtype):
    check(make(2, 2, queries, keys, 64, dtype))


@pytest.mark.parametrize("tokens", [577, 1025])
def test_long_sequences(tokens):
    check(make(1, 1, tokens, tokens, 64))
    check(make(1, 1, tokens, tokens, 72, BF16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 24, 33, 72, 80, 88, 96, 128, 256])
def test_head_dims(dim, dtype):
    check(make(1, 2, 37, 41, dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype):
    """One key takes all the weight, so q and k get no gradient, up to the rounding of dout v^T - delta."""
    inputs = make(2, 3, 1, 1, 64, dtype)
    dout = torch.randn(2, 3, 1, 64).to(dtype)
    results = run_with_gradients(attention, inputs, dout)
    assert torch.equal(results["output"], inputs["v"])
    assert torch.equal(results["grad_v"], dout)
    assert max(results["grad_q"].abs().max(), results["grad_k"].abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 64, 197])
def test_packed(tokens, dtype):
    inputs = {"qkv": torch.randn(2, tokens, 3 * 3 * 40).to(dtype).requires_grad_(), "num_heads": 3}
    assert_op_as_accurate("attention_packed", attention_packed, inputs)
    assert_op_as_accurate("attention_packed", attention_packed, inputs | {"qkv": sliced(inputs["qkv"])})


MASKS = {
    "keys": (40,),
    "queries": (50, 1),
    "scores": (50, 40),
    "padding": (2, 1, 1, 40),
    "heads": (3, 50, 40),
    "bias": (1, 3, 50, 40),
    "sample": (2, 1, 50, 40),
    "full": (2, 3, 50, 40),
    "one": (),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKS)
def test_boolean_masks(shape, dtype):
    mask = torch.rand(MASKS[shape]) > 0.3
    check(make(2, 3, 50, 40, 32, dtype), attn_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKS)
def test_additive_masks(shape, dtype):
    mask = torch.randn(MASKS[shape]).to(dtype)
    check(make(2, 3, 50, 40, 32, dtype), attn_mask=mask)


def test_mask_layouts():
    inputs = make(2, 3, 50, 40, 32)
    full = torch.randn(2, 3, 50, 40)
    expected = attention(**inputs, attn_mask=full)
    assert torch.equal(attention(**inputs, attn_mask=sliced(full)), expected)
    turned = full.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attention(**inputs, attn_mask=turned), expected)
    assert torch.equal(attention(**inputs, attn_mask=full.double()), expected)
    wide = torch.randn(1, 1, 1, 40).expand(2, 3, 50, 40)
    assert torch.equal(attention(**inputs, attn_mask=wide), attention(**inputs, attn_mask=wide.contiguous()))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(50, 50), (197, 197), (70, 33), (33, 130), (130, 600)], ids=str)
def test_causal(queries, keys, dtype):
    check(make(1, 2, queries, keys, 64, dtype), is_causal=True)


def test_causal_under_a_mask():
    mask = torch.rand(2, 1, 1, 70) > 0.3
    mask[..., 0] = True
    check(make(2, 2, 70, 70, 32), is_causal=True, attn_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_get_zeros(dtype):
    inputs = make(2, 2, 70, 50, 32, dtype)
    mask = torch.rand(2, 1, 70, 50) > 0.5
    mask[0, 0, 3], mask[1] = False, False
    results = run_with_gradients(attention, inputs | {"attn_mask": mask})
    for name in ("output", "grad_q"):
        assert not results[name][0, :, 3].any()
        assert not results[name][1].any()
    assert not results["grad_k"][1].any()
    check(inputs, attn_mask=mask)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.3])
def test_scales(scale):
    inputs = make(1, 2, 33, 40, 32)
    if scale == 0.0:  # q and k get exact zeros
        results = run_with_gradients(attention, inputs | {"scale": scale})
        torch.testing.assert_close(results["output"], inputs["v"].mean(2, keepdim=True).expand(1, 2, 33, 32))
        assert not results["grad_q"].any()
    else:
        check(inputs, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_magnitude(dtype):
    """Scores of many hundreds: their own rounding decides the error."""
    check(make(1, 2, 50, 50, 64, dtype, scale=10.0))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_scores_far_below_zero(dtype):
    """A padded key would score 0; here every real key scores about -800, so a padded one would win everything."""
    q, k, v = make(1, 2, 50, 50, 64, dtype).values()
    inputs = {"q": q.detach() * 0.1 + 10, "k": k.detach() * 0.1 - 10, "v": v.detach()}
    output = attention(**inputs)
    exact = reference.attention(**cast_inputs(inputs, torch.float64))
    assert_as_accurate(output, reference.attention(**inputs), exact)


def test_denormals():
    inputs = {name: value.detach() * 1e-40 for name, value in make(1, 1, 20, 20, 16).items()}
    torch.testing.assert_close(attention(**inputs), inputs["v"].mean(2, keepdim=True).expand(1, 1, 20, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    inputs = make(2, 2, 21, 43, 24, dtype)
    check({name: sliced(value) for name, value in inputs.items()})
    turned = {n: v.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for n, v in inputs.items()}
    check(turned)
    odd = {n: torch.cat([v.detach(), v.detach()], -1)[..., 3:27].requires_grad_() for n, v in inputs.items()}
    check(odd)
    heads_last = {n: v.detach().permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for n, v in inputs.items()}
    check({n: v.requires_grad_() for n, v in heads_last.items()})


def test_expanded_gradient():
    inputs = make(2, 2, 9, 9, 32)
    one = run_with_gradients(attention, inputs, torch.ones(1, 1, 1, 1).expand(2, 2, 9, 32))
    full = run_with_gradients(attention, inputs, torch.ones(2, 2, 9, 32))
    assert all(torch.equal(one[name], full[name]) for name in full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_written_in_place_and_nowhere_else(dtype):
    tokens, heads, dim = 37, 2, 24
    q, k, v = torch.randn(2, tokens, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    buffer = torch.full((3, tokens + 2, 3, heads, dim + 8), float("nan")).to(dtype)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    window = (slice(0, 2), slice(1, 1 + tokens), slice(None), slice(None), slice(0, dim))
    inside[window] = True
    out, statistics = C.attention_fwd(q, k, v, None, False, 0.2)
    grads = buffer[window].permute(2, 0, 3, 1, 4).unbind(0)
    C.attention_bwd(torch.randn_like(q), q, k, v, None, False, out, statistics, 0.2, *grads)
    assert torch.equal(torch.isnan(buffer), ~inside)


@pytest.mark.parametrize("is_causal", [False, True])
def test_statistics(is_causal):
    q, k, v = (value.detach() for value in make(2, 2, 33, 70, 32).values())
    _, (shift, inverse_sum) = C.attention_fwd(q, k, v, None, is_causal, 0.3)
    scores = q.double() @ k.double().transpose(-2, -1) * 0.3
    if is_causal:
        scores = scores.masked_fill(~torch.ones(33, 70, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(shift.double(), scores.amax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift - inverse_sum.log(), torch.logsumexp(scores, -1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nan_and_inf_spread_as_in_the_formula(dtype, poison):
    inputs = {name: value.detach() for name, value in make(1, 3, 40, 40, 40, dtype).items()}
    inputs["q"][0, 0, 5, 3] = inputs["k"][0, 1, 7, 3] = inputs["v"][0, 2, 9, 3] = poison
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    ours, exact = run_with_gradients(attention, inputs), run_with_gradients(reference.attention, inputs)
    for name in ours if math.isnan(poison) else ("output",):
        assert torch.equal(torch.isnan(ours[name]), torch.isnan(exact[name])), name
        assert torch.equal(torch.isinf(ours[name]), torch.isinf(exact[name])), name


def test_a_masked_score_does_not_show():
    inputs = {name: value.detach() for name, value in make(1, 1, 20, 20, 16).items()}
    mask = torch.ones(20, dtype=torch.bool)
    mask[7] = False
    clean = attention(**inputs, attn_mask=mask)
    inputs["k"][0, 0, 7] = float("nan")
    assert torch.equal(attention(**inputs, attn_mask=mask), clean)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5)])
def test_nothing_to_attend(batch, queries, keys):
    results = run_with_gradients(attention, make(batch, 2, queries, keys, 16))
    assert results["output"].shape == (batch, 2, queries, 16)
    assert results["grad_k"].shape == (batch, 2, keys, 16)
    assert not results["grad_k"].any()
    assert not results["grad_v"].any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_bits_do_not_depend_on_threads(options, dtype):
    inputs = make(1, 3, 131, 131, 40, dtype)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(run_with_gradients(attention, inputs | options))
        finally:
            torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
        assert torch.equal(results[2][name], value), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bits_do_not_depend_on_the_batch(dtype):
    inputs = make(3, 2, 70, 70, 40, dtype)
    together = run_with_gradients(attention, inputs)
    for i in range(3):
        alone = {name: value.detach()[i : i + 1].requires_grad_() for name, value in inputs.items()}
        for name, value in run_with_gradients(attention, alone).items():
            assert torch.equal(value, together[name][i : i + 1]), name


def test_several_python_threads():
    inputs = make(1, 2, 70, 70, 40)
    expected = run_with_gradients(attention, inputs)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                got = run_with_gradients(ops.attention, inputs)
                assert all(torch.equal(got[name], value) for name, value in expected.items())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_fork():
    """A child of a process that never used its thread pool computes by itself; one thread needs no pool."""
    inputs = {name: value.detach() for name, value in make(1, 2, 20, 20, 16).items()}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = attention(**inputs)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(attention(**inputs), expected) else 1)
        _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.fixture
def seeded(monkeypatch):
    """The op with the reference's ``dropout_seed`` in place of the generator's next number."""

    def call(op, dropout_seed, **inputs):
        monkeypatch.setattr(_attention_general, "draw_seed", lambda device: dropout_seed)
        return op(**inputs)

    return call


SEEDS = [0, 5, 2**63 - 1]
GENERAL = ("attention_general", "attention_general_packed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(50, 50, 64), (197, 197, 64), (1, 70, 40), (70, 33, 33)], ids=str)
def test_dropout(seeded, queries, keys, dim, dtype):
    inputs = make(2, 3, queries, keys, dim, dtype) | {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])}
    assert_op_as_accurate("attention", lambda **inputs: seeded(attention, **inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_under_a_mask(seeded, is_causal, dtype):
    mask = torch.rand(2, 1, 1, 70) > 0.3
    mask[..., 0] = True
    options = {"dropout_p": 0.1, "dropout_seed": torch.tensor([5]), "attn_mask": mask, "is_causal": is_causal}
    check_seeded = make(2, 2, 70, 70, 32, dtype) | options
    assert_op_as_accurate("attention", lambda **inputs: seeded(attention, **inputs), check_seeded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_dropout(seeded, dtype):
    inputs = {"qkv": torch.randn(2, 70, 3 * 3 * 40).to(dtype).requires_grad_(), "num_heads": 3}
    inputs |= {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])}
    assert_op_as_accurate("attention_packed", lambda **inputs: seeded(attention_packed, **inputs), inputs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 0.999, 1 - 1e-9])
def test_dropout_keeps_what_the_reference_keeps(seeded, dropout_p, seed):
    """With equal scores and unit vectors as values the output shows which weights are kept, and dv which were."""
    shape, seed = (2, 2, 133, 130), torch.tensor([seed])
    keeps = reference.dropout_keeps(seed, dropout_p, shape)
    q, k, v = torch.zeros(2, 2, 133, 130), torch.zeros(2, 2, 130, 130), torch.eye(130).expand(2, 2, 130, 130)
    inputs = {"q": q, "k": k, "v": v.clone().requires_grad_(), "dropout_p": dropout_p, "dropout_seed": seed}
    dout = torch.eye(133)[:, :130].expand(2, 2, 133, 130)
    results = run_with_gradients(lambda **inputs: seeded(attention, **inputs), inputs, dout)
    assert torch.equal(results["output"] != 0, keeps)
    assert torch.equal(results["grad_v"] != 0, keeps.transpose(2, 3)[..., :130])


def test_dropout_is_the_reference_with_the_same_generator():
    inputs, results = make(2, 2, 33, 40, 32) | {"dropout_p": 0.4}, []
    for backend in ("cpp", "reference", "cpp"):
        torch.manual_seed(3)
        with use_backend(backend):
            results.append(run_with_gradients(ops.attention, inputs))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)
        assert torch.equal(value, results[2][name]), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bits_of_dropout_do_not_depend_on_threads(seeded, dtype):
    inputs = make(1, 3, 131, 131, 40, dtype) | {"dropout_p": 0.2, "dropout_seed": torch.tensor([5])}
    results, before = [], torch.get_num_threads()
    for threads in (1, 5):
        torch.set_num_threads(threads)
        try:
            results.append(run_with_gradients(lambda **inputs: seeded(attention, **inputs), inputs))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_dropout_as_a_registered_op():
    seed, mask = torch.tensor([5]), torch.rand(2, 1, 1, 20) > 0.2
    fwd, packed_fwd = (getattr(torch.ops.fastvit, f"{name}_fwd").default for name in GENERAL)
    heads = make(2, 2, 9, 20, 32)
    torch.library.opcheck(fwd, (*heads.values(), *_heads.Flat(), mask, True, 0.2, seed, 0.2, "cpp"))
    qkv = torch.randn(2, 9, 3 * 64, requires_grad=True)
    torch.library.opcheck(packed_fwd, (qkv, *_heads.Flat(), 2, 0.2, seed, 0.2, "cpp"))


def test_dropout_compiles_and_has_second_derivatives(seeded):
    inputs = make(1, 2, 9, 20, 32)
    options = {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])}

    def second(fn):
        output = fn(**inputs, **options)
        grads = torch.autograd.grad(output.square().sum(), inputs.values(), create_graph=True)
        return output, *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs.values())

    ours, expected = second(lambda **inputs: seeded(attention, **inputs)), second(reference.attention)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    plain = inputs | {"dropout_p": 0.3}
    torch.manual_seed(3)
    eager = run_with_gradients(ops.attention, plain)
    torch.manual_seed(3)
    for name, value in run_with_gradients(compiled, plain).items():
        assert torch.equal(value, eager[name]), name


def test_errors_of_dropout():
    q, seed = torch.zeros(1, 2, 5, 16), torch.tensor([5])
    with pytest.raises(ValueError, match=r"dropout_p is 1, expected a probability in \[0, 1\)"):
        C.attention_general_fwd(q, q, q, *_heads.Flat(), None, False, 1.0, seed, 1.0, None)
    with pytest.raises(ValueError, match=r"dropout_seed is Float \(1,\) on cpu, expected int64 \(1,\) on the CPU"):
        C.attention_general_fwd(q, q, q, *_heads.Flat(), None, False, 0.5, seed.float(), 1.0, None)


def test_refusals():
    inputs = {name: value.detach() for name, value in make(1, 2, 5, 5, 16).items()}
    with pytest.raises(Unsupported, match="attn_mask requires a gradient, cpp gives none"):
        attention(**inputs, attn_mask=torch.zeros(5, 5, requires_grad=True))
    with pytest.raises(Unsupported, match=r"q is torch.float64, the kernels take float32"):
        attention(**{name: value.double() for name, value in inputs.items()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 5, 16)}, r"q has shape \(2, 5, 16\), expected \(B, H, N, D\)"),
        ({"q": torch.zeros(1, 2, 5, 16, device="meta")}, "q is on meta, expected the CPU"),
        ({"k": torch.zeros(1, 2, 0, 16)}, r"k has shape \(1, 2, 0, 16\), expected .* at least one token"),
        ({"k": torch.zeros(1, 2, 5, 8)}, r"k has shape \(1, 2, 5, 8\), expected \(1, 2, 5, 16\) like q"),
        ({"v": torch.zeros(1, 2, 4, 16)}, r"v has shape \(1, 2, 4, 16\), expected \(1, 2, 5, 16\) like k"),
        ({"v": torch.zeros(1, 2, 5, 16).half()}, "v has dtype Half, expected Float like q"),
        ({"attn_mask": torch.zeros(4, 5)}, r"attn_mask has shape \(4, 5\), expected one broadcastable to"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int)}, "attn_mask has dtype Int, expected bool or a floating"),
    ],
)
def test_errors(changed, message):
    inputs = {name: torch.zeros(1, 2, 5, 16) for name in "qkv"} | {"attn_mask": None} | changed
    with pytest.raises(ValueError, match=message):
        C.attention_fwd(*inputs.values(), False, 1.0)


def test_backward_errors():
    q = torch.zeros(1, 2, 5, 16)
    out, statistics = C.attention_fwd(q, q, q, None, False, 1.0)

    def backward(dout=q, statistics=statistics, dq=q, dk=q):
        C.attention_bwd(dout, q, q, q, None, False, out, statistics, 1.0, dq, dk, torch.zeros_like(q))

    with pytest.raises(ValueError, match=r"dout has shape \(1, 2, 4, 16\), expected \(1, 2, 5, 16\) like q"):
        backward(dout=q[:, :, :4])
    with pytest.raises(ValueError, match="statistics has dtype Half, expected contiguous float32"):
        backward(statistics=statistics.half())
    with pytest.raises(ValueError, match="dq has dtype BFloat16, expected Float like q"):
        backward(dq=q.bfloat16())
    with pytest.raises(ValueError, match="dk has stride 5 in its last dimension, expected 1"):
        backward(dk=torch.zeros(1, 2, 16, 5).transpose(2, 3))
