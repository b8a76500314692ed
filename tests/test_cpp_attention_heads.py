"""Attention of normalised and rotated q and k on the CPU against the reference, forward and all gradients."""

import importlib

import cpp_ops
import pytest
import torch

from fastvit import ops, reference
from fastvit.dispatch import use_backend
from fastvit.ops import _attention_general, _heads
from fastvit.reference import HeadNorm, Rope
from fastvit.testing import assert_as_accurate, cast_inputs, run_with_gradients, sliced

C = cpp_ops.C

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
NORMS = ("q_weight", "q_bias", "k_weight", "k_bias")


def heads(batch, num_heads, queries, keys, dim, dtype=FP32, norm="layer", weight_dtype=None):
    """q, k, v and the weights of two norms, all asking for gradients."""
    sizes = {"q": (batch, num_heads, queries, dim), "k": (batch, num_heads, keys, dim)}
    values = {name: torch.randn(size).to(dtype) for name, size in (sizes | {"v": sizes["k"]}).items()}
    return {name: value.requires_grad_() for name, value in (values | weights(dim, dtype, norm, weight_dtype)).items()}


def weights(dim, dtype=FP32, norm="layer", weight_dtype=None):
    names = {"layer": NORMS, "rms": NORMS[::2], "": ()}[norm]
    values = {name: 0.3 * torch.randn(dim) + (1.0 if "weight" in name else 0.0) for name in names}
    return {name: value.to(weight_dtype or dtype).requires_grad_() for name, value in values.items()}


def table(tokens, dim, *leading):
    """Sines and cosines of random angles, another one for every column, which is more than a rotation asks for."""
    angles = torch.randn(*leading, tokens, dim) * 3
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def calling(fn, norm, rope=None, **options):
    """``fn`` of q, k, v (or qkv) and the norms' weights by name; q is normalised with another eps than k."""

    def call(q_weight=None, q_bias=None, k_weight=None, k_bias=None, **rows):
        norms = {}
        if norm:
            norms["q_norm"] = HeadNorm(q_weight, q_bias, 1e-6, norm == "rms")
            norms["k_norm"] = HeadNorm(k_weight, k_bias, 1e-2, norm == "rms")
        wide = rope
        if rope is not None and next(iter(rows.values())).dtype == torch.float64:
            wide = rope._replace(table=rope.table.double())
        cpp_ops.poison()
        return fn(**rows, **norms, rope=wide, **options)

    return call


def check(inputs, norm="layer", rope=None, name="attention", **options):
    """As accurate as the reference in its own dtype; returns our results."""
    meaning = calling(getattr(reference, name), norm, rope, **options)
    options.pop("dropout_seed", None)
    with torch.no_grad():
        out = meaning(**inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    with use_backend("cpp"):
        ours = run_with_gradients(calling(getattr(ops, name), norm, rope, **options), inputs, dout)
    eager = run_with_gradients(meaning, inputs, dout)
    exact = run_with_gradients(meaning, cast_inputs(inputs, torch.float64), dout)
    assert ours.keys() == exact.keys()
    for key, value in ours.items():
        assert_as_accurate(value, eager[key], exact[key], key)
    return ours


@pytest.fixture(autouse=True)
def _nothing_by_stock(monkeypatch):
    """What the kernel cannot take would be prepared by stock PyTorch, and pass too."""

    def refuse(*args):
        raise AssertionError("prepared by stock PyTorch")

    for module in (ops_module("attention"), ops_module("attention_varlen")):
        monkeypatch.setattr(module, "_prepared", refuse)


def ops_module(name):
    return importlib.import_module(f"fastvit.ops.{name}")


HALF = {"half": True, "interleaved": False, "no rope": None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", HALF)
@pytest.mark.parametrize("norm", ["layer", "rms", ""])
@pytest.mark.parametrize("dim", [64, 72])
def test_norms_and_rotations(dim, norm, layout, dtype):
    half = HALF[layout]
    rope = None if half is None else Rope(table(44, dim), 1, half)
    inputs = heads(2, 2, 37, 45, dim, dtype, norm)
    if rope is None:  # a bias on every key moves all scores of a query alike: its gradient is zero but for noise
        inputs.pop("k_bias", None)
    check(inputs, norm, rope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 6, 8, 24, 33, 34, 40, 80, 88, 96, 128, 130, 256])
def test_head_dims(dim, dtype):
    if dim > 2:  # one column normalised is its bias, and two are 1 and -1
        inputs = heads(1, 2, 21, 23, dim, dtype)
        inputs.pop("k_bias")
        check(inputs)
    for half in (False, True) if dim % 2 == 0 else ():
        check(heads(1, 2, 21, 23, dim, dtype, ""), "", Rope(table(20, dim), 3, half))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 197), (2, 2), (65, 65), (197, 197), (201, 201), (33, 300), (130, 600)], ids=str
)
def test_lengths(queries, keys, dtype):
    if keys == 1:  # one key takes all the weight: there is no gradient to compare
        rope = Rope(table(1, 32), 0, True)
        inputs = heads(2, 2, 1, 1, 32, dtype)
        with use_backend("cpp"):
            assert torch.equal(calling(ops.attention, "layer", rope)(**inputs), inputs["v"])
        return
    batch = 2 if queries > 2 else 16  # the maximum of a few errors is chance
    check(heads(batch, 2, queries, keys, 64, dtype), "layer", Rope(table(keys - 1, 64), 1, True))


@pytest.mark.parametrize("prefix", [0, 1, 5, 63, 64, 65, 130])
def test_prefix_tokens_are_not_rotated(prefix):
    """Up to all of them, across the blocks that queries and keys are taken in."""
    check(heads(1, 2, 130, 130, 32), "layer", Rope(table(130 - prefix, 32), prefix, True))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("leading", [(3,), (2, 1), (2, 3), (1, 3)], ids=str)
def test_tables_of_a_head_or_a_sample(leading, half):
    check(heads(2, 3, 33, 33, 64, norm="rms"), "rms", Rope(table(33, 64, *leading), 0, half))


def test_layouts_of_a_table():
    inputs = heads(2, 3, 9, 9, 32)
    values = table(8, 32, 2, 3)
    with use_backend("cpp"):
        expected = run_with_gradients(calling(ops.attention, "layer", Rope(values, 1)), inputs)
        for view in (sliced(values), values.double(), values.transpose(2, 3).contiguous().transpose(2, 3)):
            found = run_with_gradients(calling(ops.attention, "layer", Rope(view, 1)), inputs)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        shared = values[:1, :1].expand(2, 3, 8, 64)
        found = [calling(ops.attention, "layer", Rope(view, 1))(**inputs) for view in (shared, shared.contiguous())]
        assert torch.equal(*found)
    check(inputs, "layer", Rope(values.bfloat16(), 1, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_without_weights_and_of_another_dtype(dtype):
    check({name: t for name, t in heads(1, 2, 21, 21, 32, dtype).items() if name not in NORMS})
    check({name: t for name, t in heads(1, 2, 21, 21, 32, dtype).items() if name not in NORMS}, "rms")
    check(heads(1, 2, 21, 21, 40, dtype, "rms", weight_dtype=FP32), "rms")
    alone = heads(1, 2, 21, 21, 40, dtype)
    check({name: t for name, t in alone.items() if name not in ("q_bias", "k_weight")}, "layer", Rope(table(21, 40)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40,), (30, 1), (30, 40), (2, 1, 1, 40), (3, 30, 40)], ids=str)
def test_masks(shape, dtype):
    check(heads(2, 3, 30, 40, 64, dtype), "layer", Rope(table(37, 64), 3), attn_mask=torch.rand(shape) > 0.3)
    mask = torch.randn(shape).to(dtype)
    check(heads(2, 3, 30, 40, 64, dtype, "rms"), "rms", Rope(table(37, 64), 3, True), attn_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_order_under_a_mask_and_sliced_inputs(dtype):
    mask = torch.rand(2, 1, 70, 90) > 0.4
    mask[..., 0] = True
    inputs = heads(2, 1, 70, 90, 64, dtype)
    inputs = {name: sliced(t) if t.dim() == 4 else t for name, t in inputs.items()}
    check(inputs, "layer", Rope(table(87, 64), 3, True), attn_mask=mask, is_causal=True)


def test_a_query_without_keys_takes_no_gradient():
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[2] = False
    ours = check(heads(1, 1, 7, 9, 32), "layer", Rope(table(9, 32)), attn_mask=mask)
    assert not ours["output"][:, :, 2].any()
    assert not ours["grad_q"][:, :, 2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout(monkeypatch, is_causal, dtype):
    seed = torch.tensor([5])
    monkeypatch.setattr(_attention_general, "draw_seed", lambda device: seed)
    options = {"dropout_p": 0.3, "dropout_seed": seed, "is_causal": is_causal}
    check(heads(2, 2, 37, 37, 64, dtype), "layer", Rope(table(36, 64), 1, True), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 64, 201])
def test_a_packed_projection(tokens, dtype):
    """Its gradient is packed too."""
    qkv = torch.randn(2, tokens, 3 * 3 * 64).to(dtype).requires_grad_()
    rope = Rope(table(tokens - 4, 64), 4, True)
    for rows in (qkv, sliced(qkv)):
        check({"qkv": rows, **weights(64, dtype)}, "layer", rope, "attention_packed", num_heads=3)
    check({"qkv": qkv}, "", rope, "attention_packed", num_heads=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (2,)], ids=str)
def test_a_ragged_batch(leading, dtype):
    """Its table has a row for every row of the batch."""
    lengths = [20, 0, 70, 1, 130]
    rows = {name: torch.randn(sum(lengths), 2, 40).to(dtype).requires_grad_() for name in "qkv"}
    where = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "max_seqlen": 130}
    for half in (False, True):
        rope = Rope(table(sum(lengths), 40, *leading), 0, half)
        check(rows | weights(40, dtype), "layer", rope, "attention_varlen", **where)
    check(rows | weights(40, dtype, "rms"), "rms", None, "attention_varlen", **where, is_causal=True)


def same_bits(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    inputs, rope = heads(3, 2, 150, 150, 64, dtype), Rope(table(149, 64), 1, True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 9, 2):
        torch.set_num_threads(threads)
        try:
            with use_backend("cpp"):
                results.append(run_with_gradients(calling(ops.attention, "layer", rope), inputs))
        finally:
            torch.set_num_threads(before)
    for found in results[1:]:
        same_bits(found, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_has_the_bits_it_has_alone(dtype):
    inputs, rope = heads(3, 2, 70, 70, 64, dtype), Rope(table(70, 64, 3, 1), 0)
    alone = {name: t[1:2].detach().requires_grad_() if t.dim() == 4 else t for name, t in inputs.items()}
    with use_backend("cpp"):
        batch = run_with_gradients(calling(ops.attention, "layer", rope), inputs)
        found = run_with_gradients(calling(ops.attention, "layer", Rope(rope.table[1:2])), alone)
    same_bits({name: found[name] for name in ("output", "grad_q", "grad_k", "grad_v")},
              {name: batch[name][1:2] for name in ("output", "grad_q", "grad_k", "grad_v")})  # fmt: skip


def test_packed_and_separate_have_the_same_bits():
    qkv, rope = torch.randn(2, 40, 3 * 2 * 64), Rope(table(39, 64), 1, True)
    separate = {**dict(zip("qkv", reference.unpack_qkv(qkv, 2), strict=True)), **weights(64)}
    norms = {name: separate[name] for name in NORMS}
    with use_backend("cpp"):
        found = calling(ops.attention_packed, "layer", rope, num_heads=2)(qkv=qkv, **norms)
        expected = calling(ops.attention, "layer", rope)(**separate)
    assert torch.equal(found, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 0, 5, 5)], ids=str)
def test_nothing_to_attend(sizes):
    inputs = heads(*sizes, 32)
    with use_backend("cpp"):
        ours = run_with_gradients(calling(ops.attention, "layer", Rope(table(5, 32))), inputs)
    assert ours["output"].shape == (*sizes[:3], 32)
    assert not any(ours[f"grad_{name}"].any() for name in NORMS)


def test_huge_and_unkind_rows():
    """A row of one value has no variance; large ones lose nothing before they are normalised."""
    inputs = heads(1, 1, 33, 33, 64)
    with torch.no_grad():
        inputs["q"][:, :, 3], inputs["k"][:, :, 5] = 2.0, 0.0
        inputs["q"][:, :, 4] *= 1e4
    check(inputs, "layer", Rope(table(33, 64), 0, True))
    with torch.no_grad():
        inputs["k"][:, :, 7, 9] = float("nan")
    with use_backend("cpp"):
        assert calling(ops.attention, "layer", Rope(table(33, 64)))(**inputs).isnan().all()


def test_opcheck_and_fullgraph_compile():
    inputs, rope = heads(1, 2, 5, 7, 32), Rope(table(6, 32), 1)
    q, k, v, *vectors = inputs.values()
    flat = _heads.flat(HeadNorm(*vectors[:2]), HeadNorm(*vectors[2:]), rope)
    overload = torch.ops.fastvit.attention_general_fwd.default
    torch.library.opcheck(overload, (q, k, v, *flat, None, False, 0.0, None, 0.2, "cpp"))
    torch.compiler.reset()

    def fn(q_weight, q_bias, k_weight, k_bias, **rows):
        norms = {"q_norm": HeadNorm(q_weight, q_bias), "k_norm": HeadNorm(k_weight, k_bias)}
        return ops.attention(**rows, **norms, rope=rope)

    expected = run_with_gradients(fn, inputs)
    for name, value in run_with_gradients(torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs).items():
        torch.testing.assert_close(value, expected[name])


def test_double_backward_is_the_reference():
    fn = calling(ops.attention, "layer", Rope(table(8, 32), 1, True))

    def second(inputs):
        leaves = list(inputs.values())
        grads = torch.autograd.grad(fn(**inputs).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)

    inputs = heads(1, 1, 9, 9, 32)
    ours = second(inputs)
    with use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_module("attention"), "_prepared", prepared_by_the_reference)
        eager, exact = second(inputs), second(cast_inputs(inputs, torch.float64))
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_as_accurate(a, b, c)


def prepared_by_the_reference(q, k, q_norm=None, k_norm=None, rope=None):
    return reference.prepare_heads(q, q_norm, rope), reference.prepare_heads(k, k_norm, rope)


def test_what_the_kernel_does_not_take_is_prepared_by_stock(monkeypatch):
    """One norm without the other, two kinds, and a table that asks for a gradient."""
    monkeypatch.setattr(ops_module("attention"), "_prepared", prepared_by_the_reference)
    q, k, v = (torch.randn(2, 2, 9, 32) for _ in range(3))
    wide = table(9, 32).requires_grad_()
    for options in (
        {"q_norm": HeadNorm()},
        {"k_norm": HeadNorm(rms=True), "rope": Rope(table(9, 32))},
        {"q_norm": HeadNorm(), "k_norm": HeadNorm(rms=True)},
        {"rope": Rope(wide)},
    ):
        with use_backend("cpp"):
            found = ops.attention(q, k, v, **options)
        torch.testing.assert_close(found, reference.attention(q, k, v, **options), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert wide.grad is not None


GIVEN = _heads.Flat()._asdict() | {
    **{"attn_mask": None, "is_causal": False, "dropout_p": 0.0, "dropout_seed": None, "scale": 1.0, "cu_seqlens": None},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "batch"}, "attention: norm is 'batch', expected one of '', 'layer', 'rms'"),
        ({"q_weight": torch.ones(8)}, r"q_weight has shape \(8,\), expected \(16,\) like the head dim of q"),
        ({"k_bias": torch.ones(16).double()}, "k_bias has dtype Double"),
        ({"rope": torch.ones(4, 32)}, r"rope has shape \(4, 32\), expected one broadcastable to \(2, 3, 5, 32\)"),
        ({"rope": torch.ones(2, 5, 32)}, r"rope has shape \(2, 5, 32\), expected one broadcastable to"),
        ({"rope": torch.ones(1, 1, 1, 5, 32)}, r"expected one broadcastable to \(2, 3, 5, 32\)"),
        ({"rope": torch.ones(5, 32), "num_prefix": 6}, "num_prefix is 6 of 5 queries and 5 keys"),
        ({"rope": torch.ones(5, 32), "num_prefix": -1}, "num_prefix is -1 of 5 queries and 5 keys"),
    ],
)
def test_errors(changed, message):
    q = torch.zeros(2, 3, 5, 16)
    with pytest.raises(ValueError, match=message):
        C.attention_general_fwd(q, q, q, **(GIVEN | changed))


def test_more_queries_than_keys_and_odd_dims_are_errors():
    q, odd = torch.zeros(2, 3, 6, 16), torch.zeros(2, 3, 5, 15)
    with pytest.raises(ValueError, match="num_prefix is 0 of 6 queries and 5 keys"):
        C.attention_general_fwd(q, q[:, :, :5], q[:, :, :5], **(GIVEN | {"rope": torch.ones(5, 32)}))
    with pytest.raises(ValueError, match="expected an even head dim with rope"):
        C.attention_general_fwd(odd, odd, odd, **(GIVEN | {"rope": torch.ones(5, 30)}))
