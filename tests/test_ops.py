"""The public ops: their contract, and each CPU backend against the reference."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import _extension, ops, reference
from fastvit.dispatch import OPS, Unsupported, recording, use_backend
from fastvit.ops import _heads
from fastvit.testing import (
    VIT_SHAPES,
    Shape,
    assert_as_accurate,
    assert_op_as_accurate,
    cast_inputs,
    make_inputs,
    run_with_gradients,
    sliced,
)

SMALL = Shape(embed_dim=64, num_heads=2, hidden_dim=96, tokens=5, patch_size=8, image_size=16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cpp = pytest.mark.skipif(_extension.CPP is None, reason="; ".join(_extension.WHY_NOT_CPP))


CASES = [
    pytest.param(op, backend, marks=needs_cpp if backend == "cpp" else ())
    for op in OPS
    if op != "made_up"
    for backend in ("torch", "cpp")
    if backend in OPS[op].backends
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_parity(op, backend, dtype):
    with use_backend(backend):
        assert_op_as_accurate(op, getattr(ops, op), make_inputs(op, SMALL, 3, dtype))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_parity_at_vit_size(op, backend):
    with use_backend(backend):
        assert_op_as_accurate(op, getattr(ops, op), make_inputs(op, VIT_SHAPES["tiny"], 2, torch.float32))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_sliced_inputs(op, backend):
    inputs = make_inputs(op, SMALL, 3, torch.float32)
    views = {name: sliced(v) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
    with use_backend(backend):
        assert_op_as_accurate(op, getattr(ops, op), views)


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_only_the_wanted_gradients(op, backend):
    """Freeze the inputs one after another: the other gradients must not change."""
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    with use_backend(backend):
        full = run_with_gradients(getattr(ops, op), inputs)
        for frozen in [name for name, v in inputs.items() if isinstance(v, torch.Tensor)][:-1]:
            some = inputs | {frozen: inputs[frozen].detach()}
            for name, value in run_with_gradients(getattr(ops, op), some).items():
                torch.testing.assert_close(value, full[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_empty_batch(op, backend):
    inputs = make_inputs(op, SMALL, 0, torch.float32)
    with use_backend(backend):
        results = run_with_gradients(getattr(ops, op), inputs)
    expected = run_with_gradients(getattr(reference, op), inputs)
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name])


NOT_STOCK_ATTENTION = [case for case in CASES if "attention" not in case.values[0] or case.values[1] != "torch"]


# Stock attention on the CPU turns a query of NaN into zeros.
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("op", "backend"), NOT_STOCK_ATTENTION)
def test_nan_and_infinity_spread_as_in_stock(op, backend, value):
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    first = next(iter(inputs))
    with torch.no_grad():
        inputs[first][(0,) * inputs[first].dim()] = value
        expected = getattr(reference, op)(**inputs)
        with use_backend(backend):
            ours = getattr(ops, op)(**inputs)
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert torch.equal(ours.isnan(), expected.isnan())


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_two_runs_give_the_same_bits(op, backend):
    inputs = make_inputs(op, SMALL, 3, torch.float32)
    with use_backend(backend):
        first = run_with_gradients(getattr(ops, op), inputs)
        second = run_with_gradients(getattr(ops, op), inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("op", "backend"), [c for c in CASES if c.values[1] == "cpp"])
def test_opcheck(op, backend):
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    scaled = op in ("linear_residual", "layernorm_mlp")
    optional = {"row_scale": torch.tensor([0.0, 1.25])} if scaled else {}
    arguments = _raw_arguments(op, inputs | optional)
    torch.library.opcheck(getattr(torch.ops.fastvit, f"{op}_fwd").default, (*arguments, "cpp"))


def _raw_arguments(op, inputs):
    """What the public function hands to ``fastvit::<op>_fwd``, less the backend's name."""
    if op == "patch_embed":
        return (*(inputs[name] for name in ("images", "weight", "bias", "pos_embed", "prefix")), None, None, False)
    if op == "attention":
        return (*inputs.values(), torch.rand(5, 5) > 0.2, False, 0.2)
    if op == "attention_packed":
        return (*inputs.values(), 0.2)
    if op == "attention_varlen":
        q, k, v, *bounds = inputs.values()
        return (q, k, v, *_heads.Flat(), *bounds, False, 0.0, None, 0.2)
    if op == "layernorm_linear":
        return (*inputs.values(), 1e-6, False)
    if op == "linear_residual":
        return (*inputs.values(), False)
    return (*inputs.values(), "gelu", 1e-6, True, True, False)


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_compiles_whole_with_its_backward(op, backend):
    torch.compiler.reset()
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    with use_backend(backend):
        expected = run_with_gradients(getattr(ops, op), inputs)
        compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
        ours = run_with_gradients(compiled, inputs)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name])


def test_compiles_with_symbolic_image_sizes():
    torch.compiler.reset()
    inputs = make_inputs("patch_embed", SMALL, 2, torch.float32)
    compiled = torch.compile(ops.patch_embed, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs), ops.patch_embed(**inputs))


# Stock attention on the CPU has no second derivative.
@pytest.mark.parametrize(("op", "backend"), NOT_STOCK_ATTENTION)
def test_double_backward(op, backend):
    """Differentiate a gradient: the second derivative of every backend is the reference's."""
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    wanted = [name for name, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def second_derivatives(fn, inputs):
        output = fn(**inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
        leaves = [inputs[name] for name in wanted]
        grads = torch.autograd.grad((output * output * weights).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    with use_backend(backend):
        ours = second_derivatives(getattr(ops, op), inputs)
    stock = second_derivatives(getattr(reference, op), inputs)
    exact = second_derivatives(getattr(reference, op), cast_inputs(inputs, torch.float64))
    for name, a, b, c in zip(wanted, ours, stock, exact, strict=True):
        assert_as_accurate(a, b, c, f"second derivative by {name}")


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_autocast_keeps_the_host_dtypes(op, backend):
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    exact = run_with_gradients(getattr(reference, op), cast_inputs(inputs, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        stock = run_with_gradients(getattr(reference, op), inputs)
        with use_backend(backend):
            ours = run_with_gradients(getattr(ops, op), inputs)
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype, name
        assert_as_accurate(value, stock[name], exact[name], name)


@pytest.mark.parametrize("op", ["layernorm_linear", "linear_residual", "layernorm_mlp"])
def test_a_forced_backend_never_falls_back(op):
    inputs = make_inputs(op, SMALL, 2, torch.float64)
    with use_backend("cpp"), pytest.raises(Unsupported, match="float64"):
        getattr(ops, op)(**inputs)
    with use_backend("cuda"), pytest.raises(Unsupported, match="runs on cuda"):
        getattr(ops, op)(**inputs)


def test_float64_runs_on_plain_pytorch():
    fastvit.dispatch._warned.clear()
    reason = "x is torch.float64" if _extension.CPP else "not built"
    with recording() as calls, pytest.warns(UserWarning, match=reason):
        ops.layernorm_mlp(**make_inputs("layernorm_mlp", SMALL, 1, torch.float64))
    assert calls == [("layernorm_mlp", "torch")]


BAD = [
    ("patch_embed", {"images": lambda t: t[0]}, r"images has shape \(3, 16, 16\), expected \(B, C, IH, IW\)"),
    ("patch_embed", {"images": lambda t: t[..., :15]}, "images are 16 x 15 pixels, expected multiples of the patch"),
    ("patch_embed", {"images": lambda t: t.int()}, "images is torch.int32, expected uint8 or a floating point"),
    ("patch_embed", {"images": lambda t: t[:, :2]}, r"weight has shape \(64, 3, 8, 8\), expected \(E, 2, PH, PW\)"),
    ("patch_embed", {"bias": lambda t: t[:3]}, r"bias has shape \(3,\), expected \(64,\)"),
    ("patch_embed", {"pos_embed": lambda t: t[:3]}, r"pos_embed has shape \(3, 64\), expected \(4, 64\) or \(5, 64\)"),
    ("patch_embed", {"prefix": lambda t: t[:, :7]}, r"prefix has shape \(1, 7\), expected \(T, 64\)"),
    ("patch_embed", {"weight": lambda t: t.bfloat16()}, "bias is torch.float32, expected torch.bfloat16 like weight"),
    ("attention", {"q": lambda t: t[0]}, r"q has shape \(2, 5, 32\), expected \(B, H, N, D\)"),
    ("attention", {"k": lambda t: t[..., :8]}, r"k has shape \(2, 2, 5, 8\), expected \(2, 2, Nk, 32\) like q"),
    ("attention", {"v": lambda t: t[:, :, :4]}, r"v has shape \(2, 2, 4, 32\), expected \(2, 2, 5, 32\) like k"),
    ("attention", {"k": lambda t: t.bfloat16()}, "k is torch.bfloat16, expected torch.float32 like q"),
    ("attention", {"k": lambda t: t.to("meta")}, "k is on meta, expected cpu like q"),
    ("attention_packed", {"qkv": lambda t: t[..., :190]}, r"qkv has shape \(2, 5, 190\), expected a last dim"),
    ("attention_packed", {"qkv": lambda t: t[:, :0]}, "expected at least one token"),
    ("attention_varlen", {"q": lambda t: t[0]}, r"q has shape \(2, 32\), expected \(T, H, D\)"),
    ("attention_varlen", {"v": lambda t: t[:3]}, r"v has shape \(3, 2, 32\), expected \(7, 2, 32\) like q"),
    ("attention_varlen", {"k": lambda t: t.bfloat16()}, "k is torch.bfloat16, expected torch.float32 like q"),
    ("attention_varlen", {"cu_seqlens": lambda t: t[None]}, r"cu_seqlens has shape \(1, 3\), expected \(S \+ 1,\)"),
    ("attention_varlen", {"cu_seqlens": lambda t: t.float()}, "cu_seqlens is torch.float32, expected torch.int32 or"),
    ("attention_varlen", {"cu_seqlens": lambda t: t[:2]}, "cu_seqlens goes from 0 to 5, expected 0 to 7, q's rows"),
    ("attention_varlen", {"cu_seqlens": lambda t: t[[0, 1, 0, 2]]}, "cu_seqlens falls by 5 after sample 1"),
    (
        "attention_varlen",
        {"cu_seqlens": lambda t: t[[0, 2]]},
        "holds a sample of 7 rows, expected at most 5",
    ),
    ("layernorm_linear", {"norm_weight": lambda t: t[:5]}, r"norm_weight has shape \(5,\), expected \(64,\)"),
    ("layernorm_linear", {"weight": lambda t: t[:, :5]}, r"weight has shape \(192, 5\), expected \(O, 64\)"),
    ("layernorm_linear", {"bias": lambda t: t.long()}, "bias is torch.int64, expected a floating point dtype"),
    ("layernorm_linear", {"weight": lambda t: t.double()}, "weight is torch.float64, expected torch.float32 or"),
    ("linear_residual", {"residual": lambda t: t[:1]}, r"residual has shape \(1, 5, 64\), expected \(2, 5, 64\)"),
    ("linear_residual", {"layer_scale": lambda t: t[:1]}, r"layer_scale has shape \(1,\), expected \(64,\)"),
    ("layernorm_mlp", {"fc1_bias": lambda t: t[:1]}, r"fc1_bias has shape \(1,\), expected \(96,\)"),
    ("layernorm_mlp", {"fc2_weight": lambda t: t[:60]}, r"fc2_weight has shape \(60, 96\), expected \(64, 96\)"),
    ("layernorm_mlp", {"fc1_weight": lambda t: t.to("meta")}, "fc1_weight is on meta, expected cpu like x"),
    ("layernorm_mlp", {"x": lambda t: t[..., :0]}, "expected a width of at least 1"),
]


@pytest.mark.parametrize(("op", "changes", "message"), BAD)
def test_bad_input_is_named(op, changes, message):
    inputs = make_inputs(op, SMALL, 2, torch.float32)
    wrong = inputs | {name: change(inputs[name].detach()) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**wrong)


def test_bad_options_are_named():
    q = torch.zeros(1, 1, 2, 32)
    with pytest.raises(ValueError, match=r"dropout_p is 1.5, expected a probability in \[0, 1\)"):
        ops.attention(q, q, q, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"attn_mask has shape \(3, 3\), expected one broadcastable to"):
        ops.attention(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool))
    mlp = make_inputs("layernorm_mlp", SMALL, 2, torch.float32)
    with pytest.raises(ValueError, match="act is 'relu'"):
        ops.layernorm_mlp(**mlp, act="relu")
    with pytest.raises(ValueError, match=r"row_scale has shape \(3,\), expected \(2,\) like the batch"):
        ops.layernorm_mlp(**mlp, row_scale=torch.ones(3))
    with pytest.raises(ValueError, match="row_scale requires a gradient"):
        ops.layernorm_mlp(**mlp, row_scale=torch.ones(2, requires_grad=True))


def test_an_empty_sample_of_a_ragged_batch_leaves_no_trace():
    inputs = make_inputs("attention_varlen", SMALL, 2, torch.float32)
    empty = inputs | {"cu_seqlens": torch.tensor([0, 0, 5, 5, 7])}
    for backend in ("torch", "reference", *(["cpp"] if _extension.CPP else [])):
        with use_backend(backend):
            ours, expected = (run_with_gradients(ops.attention_varlen, case) for case in (empty, inputs))
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("options", ["mask", "causal", "both", "vector"])
def test_masks_run_on_plain_pytorch(options):
    inputs = make_inputs("attention", SMALL, 2, torch.float32)
    shape = (5,) if options == "vector" else (2, 1, 5, 5)
    mask = {"attn_mask": torch.rand(shape) > 0.2} if options != "causal" else {}
    causal = {"is_causal": True} if options in ("causal", "both") else {}
    if mask:
        mask["attn_mask"][..., 0] = True
    with use_backend("torch"):
        ours = ops.attention(**inputs, **mask, **causal)
    torch.testing.assert_close(ours, reference.attention(**inputs, **mask, **causal))


def test_ops_survive_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs("layernorm_mlp", SMALL, 2, torch.float32)
    again = copy.deepcopy({name: v.detach() for name, v in inputs.items()})
    again = {name: v.requires_grad_() for name, v in again.items()}
    ops.layernorm_mlp(**inputs).square().sum().backward()
    checkpoint(lambda: ops.layernorm_mlp(**again), use_reentrant=False).square().sum().backward()
    for name, value in inputs.items():
        torch.testing.assert_close(again[name].grad, value.grad)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_cpp
def test_an_op_that_is_watched_goes_through_pytorch():
    """Without gradients it is called straight away, but for modes, tracers and tensor classes; the results are one."""
    inputs = make_inputs("linear_residual", VIT_SHAPES["tiny"], 1, torch.float32)
    with torch.no_grad():
        expected = fastvit.ops.linear_residual(**inputs)
        with _Seen() as seen:
            watched = fastvit.ops.linear_residual(**inputs)
        traced = make_fx(lambda x: fastvit.ops.linear_residual(**inputs | {"x": x}))(inputs["x"].detach())
    assert seen.names == ["fastvit.linear_residual_fwd.default"]
    assert torch.equal(watched, expected)
    assert "fastvit.linear_residual_fwd" in traced.code
    assert torch.equal(fastvit.ops.linear_residual(**inputs), expected)
