"""A block's inference on Hopper in one call: the bits of the four ops, and never a plan where anything is unusual."""

import dataclasses
import re
import struct
import warnings
from types import SimpleNamespace

import cuda_on_cpu
import pytest
import torch
from block_plans import OPTIONS, assert_as_by_ops, block, by_ops, of_class_token, outcome, runs_of_plans, warm
from test_host_path import CHANGES, WIDTH, tokens
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import block_plan, layers, reference
from fastvit.dispatch import OPS, explaining, recording, use_backend

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Whether each call that had a plan ran it; the way of Hopper's kernels is open meanwhile."""
    from hopper_on_cpu import hopper

    with hopper(), torch.no_grad():
        yield runs_of_plans(monkeypatch)


def warmed(dtype=BF16, **options):
    return warm(block(dtype, **options), tokens(dtype))


@pytest.mark.parametrize("stream", [BF16, F32], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_plan_of_the_class_token(options, stream, planned):
    made, x = of_class_token(block(**OPTIONS[options])), tokens(stream)
    first, second = made(x), made(x)
    assert planned == [True]
    assert torch.equal(first, second)
    assert first.shape == (2, 1, WIDTH)
    assert_as_by_ops(made, x.flip(0) + 1)
    for _ in range(2):
        assert_as_by_ops(made, x[:1])
    assert planned == [True] * 3  # all but the first call of a shape
    whole = block(**OPTIONS[options])(x)[:, :1]
    torch.testing.assert_close(first, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_plan_has_the_bits_of_the_ops(options, dtype, planned):
    made, x = block(dtype, **OPTIONS[options]), tokens(dtype)
    first, second = made(x), made(x)
    assert planned == [True]
    assert torch.equal(first, second)
    other = x.flip(0) + 1
    assert_as_by_ops(made, other)
    assert planned == [True, True]


def test_a_float32_stream(planned):
    made, x = block(BF16), tokens(F32)
    for _ in range(3):
        assert_as_by_ops(made, x)
    assert planned == [True, True]
    assert made(x).dtype == F32


def test_norms_in_float32(planned):
    made, x = warmed()
    made.norm1.float(), made.norm2.float()
    assert_as_by_ops(made, x)
    assert planned == [True] * 3


def test_blocks_of_one_kind_share_a_plan(planned):
    first, x = warmed()
    second = block()
    nn.init.normal_(second.attn.qkv.weight)
    assert_as_by_ops(second, x)
    assert not torch.equal(first(x), second(x))
    assert len(block_plan._plans) == 2
    assert all(planned)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_plan_was_made_counts(change):
    made, x = warmed()
    before = made(x)
    CHANGES[change](made)
    made.to(BF16)
    attention = {"attention_packed": "torch"} if change == "head norms" else {}  # the stand-in attends plainly
    with use_backend(**attention):
        for _ in range(3):
            assert_as_by_ops(made, x)
            assert_as_by_ops(of_class_token(made), x)
        assert not torch.equal(made(x), before)


SETTINGS = {
    "heads": lambda b: setattr(b.attn, "num_heads", 1),
    "scale": lambda b: setattr(b.attn, "scale", 0.5),
    "another 16-bit dtype": lambda b: b.half(),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_setting_of_the_same_tensors(setting, planned):
    made, x = block(), tokens(F32)
    for changed in (False, True):
        if changed:
            SETTINGS[setting](made)
        for _ in range(3):
            assert_as_by_ops(made, x)
            assert_as_by_ops(of_class_token(made), x)
    assert planned == [True] * 8


@pytest.mark.parametrize("shape", [(2, 5), (1, 5), (3, 5), (2, 9), (2, 50)], ids=str)
@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_each_size_has_its_plan(shape, ratio, planned):
    warmed()
    planned.clear()
    made, x = block(mlp_ratio=ratio), torch.randn(*shape, WIDTH).to(BF16)
    for _ in range(3):
        made(x)
    assert planned[-2:] == [True] * 2


MISFITS = {
    "bias in float32": lambda b: b.attn.proj.bias.__setattr__("data", b.attn.proj.bias.data.float()),
    "weight in float32": lambda b: b.mlp.fc1.float(),
    "weight in float16": lambda b: b.mlp.fc2.half(),
    "strided bias": lambda b: setattr(b.mlp.fc1, "bias", nn.Parameter(torch.randn(4 * WIDTH, 2, dtype=BF16)[:, 0])),
    "transposed weight": lambda b: setattr(b.mlp.fc2, "weight", nn.Parameter(b.mlp.fc2.weight.t().contiguous().t())),
    "misaligned weight": lambda b: setattr(
        b.attn.qkv, "weight", nn.Parameter(torch.randn(3 * WIDTH * WIDTH + 1, dtype=BF16)[1:].view(3 * WIDTH, WIDTH))
    ),
    "shape of a weight": lambda b: setattr(b.attn.proj, "weight", nn.Parameter(torch.randn(WIDTH, 8, dtype=BF16))),
    "shape of a bias": lambda b: setattr(b.attn.proj, "bias", nn.Parameter(torch.randn(8, dtype=BF16))),
    "norm in two dtypes": lambda b: setattr(b.norm1, "bias", nn.Parameter(torch.randn(WIDTH))),
    "norm in float64": lambda b: b.norm2.double(),
    "norm of another width": lambda b: setattr(b, "norm1", nn.LayerNorm(WIDTH - 8, dtype=BF16)),
    "layer scale in float64": lambda b: setattr(b, "ls2", layers.LayerScale(WIDTH, dtype=torch.float64)),
}


@pytest.mark.parametrize("change", MISFITS)
def test_a_parameter_that_the_kernels_do_not_take(change, planned):
    made, x = warmed()
    planned.clear()
    MISFITS[change](made)
    assert_as_by_ops(made, x)
    assert_as_by_ops(of_class_token(made), x)
    assert planned == [False] * 2


def _inputs():
    x = tokens(BF16)
    memory = torch.randn(4 * x.numel(), generator=torch.Generator().manual_seed(2)).to(BF16)
    yield "rows of a wider buffer", memory[: 2 * x.numel()].view(2, 5, 2 * WIDTH)[..., :WIDTH], True
    yield "every other sample", memory[: 2 * x.numel()].view(4, 5, WIDTH)[::2], False
    yield "tokens first", x.transpose(0, 1).contiguous().transpose(0, 1), False
    yield "every other value", memory[: 2 * x.numel()].view(2, 5, WIDTH, 2)[..., 0], False
    yield "misaligned", memory[1 : 1 + x.numel()].view(x.shape), False
    yield "expanded", x[:1].expand(2, -1, -1), False


@pytest.mark.parametrize(("name", "x", "fits"), list(_inputs()), ids=lambda value: value if type(value) is str else "")
def test_inputs_of_every_layout(name, x, fits, planned):
    made, _ = warmed()
    planned.clear()
    assert_as_by_ops(made, x)
    assert_as_by_ops(of_class_token(made), x)
    assert planned == [fits] * 2


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (2, 9), (2, 4), (2, 1), (0, 5)], ids=str)
def test_other_shapes(shape):
    made, _ = warmed()
    x = torch.randn(*shape, WIDTH).to(BF16)
    for _ in range(3):
        assert_as_by_ops(made, x)
        assert_as_by_ops(of_class_token(made), x)


def test_without_a_batch_or_with_another_dtype():
    made, x = warmed()
    for other in (x[0], x[None], x.half(), x.double(), x.float()):
        for _ in range(2):
            assert_as_by_ops(made, other)


class Seeing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watcher", [Seeing, Dispatched, recording, explaining], ids=lambda w: w.__name__)
def test_watchers_see_the_ops(watcher, planned):
    made, x = warmed()
    expected = made(x)
    planned.clear()
    with watcher() as seen:
        assert torch.equal(made(x), expected)
    assert planned == []
    if watcher in (recording, explaining):
        assert {name for name, *_ in seen} if watcher is recording else set(seen) == {*_OPS}
    made(x)
    assert planned == [True]


_OPS = ("layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp")


@pytest.mark.parametrize("choice", [{op: "torch"} for op in _OPS], ids=str)
def test_the_users_choice_holds(choice, planned):
    made, x = warmed()
    planned.clear()
    with use_backend(**choice):
        for _ in range(3):
            assert_as_by_ops(made, x)
        assert planned == []
    made(x)
    assert planned == [True]


@pytest.mark.parametrize("op", _OPS)
def test_a_backend_that_was_replaced_does_not_run(op, planned, monkeypatch):
    made, x = warmed()
    planned.clear()
    name, calls = "triton" if op == "attention_packed" else "cuda", []
    backend = OPS[op].backends[name]
    stand_in = dataclasses.replace(backend, run=lambda *args: calls.append(op) or backend.run(*args))
    with monkeypatch.context() as patch:
        patch.setattr(OPS[op], "backends", {**OPS[op].backends, name: stand_in})
        made(x)
    assert calls == [op]
    assert planned == []


def test_hooks_are_called(planned):
    made, x = warmed()
    planned.clear()
    for name, module in made.named_modules():
        if name in ("", "attn.attn_drop"):
            continue
        calls = []
        handle = module.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        assert_as_by_ops(made, x)
        assert len(calls) == 2, name
        handle.remove()
    assert planned == []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    made(x)
    handle.remove()
    assert planned == []


def test_training_and_dropout(planned):
    made, x = warmed(drop_path=0.5)
    made.train()
    planned.clear()
    torch.manual_seed(3)
    ours = made(x)
    torch.manual_seed(3)
    assert torch.equal(ours, by_ops(made, x))
    made.eval()
    made.attn.attn_drop.p = 0.5
    assert_as_by_ops(made, x)
    assert planned == [True]
    made.train()
    assert outcome(lambda: made(x)) is not None
    assert planned == [True]


def test_head_norms(planned):
    made, x = block(qk_norm=True), tokens(BF16)
    with use_backend(attention_packed="torch"):
        for _ in range(3):
            assert_as_by_ops(made, x)
    assert planned == []


def test_autocast(planned):
    made, x = warmed()
    planned.clear()
    with torch.autocast("cpu", dtype=F16):
        assert_as_by_ops(made, x)
    assert planned == []


def test_gradients(planned):
    made, x = warmed()
    planned.clear()
    with torch.enable_grad():
        assert made(x).requires_grad
        assert planned == []
        made.requires_grad_(False)
        assert_as_by_ops(made, x)
        assert planned == [True]
        assert made(x.clone().requires_grad_()).requires_grad
        made.mlp.fc2.bias.requires_grad_()
        assert made(x).requires_grad
    assert planned == [True]
    assert_as_by_ops(made, x.clone().requires_grad_())
    with torch.inference_mode():
        assert made(x).is_inference()
    assert planned == [True] * 3


def test_transforms(planned):
    made, x = warmed()
    planned.clear()
    with use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.vmap(made)(x[None])
        torch.func.jvp(made, (x,), (x,))
    assert planned == []


def test_a_profilers_hook_hears_of_the_launch(planned):
    from fastvit.kernels import _launch

    made, x = warmed()
    planned.clear()
    hook = _launch.triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        assert_as_by_ops(made, x)
    finally:
        hook.remove(print)
    assert planned == []


def test_compiled_and_traced_as_ever(planned):
    made, x = warmed()
    planned.clear()
    with use_backend("torch"):
        traced = torch.jit.trace(made, x, check_trace=False)
        assert torch.equal(traced(x), made(x))
        torch.compile(made, backend="eager", fullgraph=True)(x)
    assert planned == []


def test_a_launch_that_is_more_than_its_numbers_has_no_plan(planned, monkeypatch):
    from hopper_on_cpu import Launcher

    made, x = block(), tokens(BF16)
    monkeypatch.setattr(Launcher, "launch_pdl", True)
    for _ in range(3):
        assert_as_by_ops(made, x)
    assert planned == []


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (1, 70), (3, 1)], ids=str)
def test_a_plan_with_hoppers_own_attention(shape, dtype, planned):
    """Which needs no launch of Triton's before it: the plan is there for the first call."""
    from hopper_attention import stand_in

    torch.manual_seed(0)
    made, x = layers.Block(128, 2, qkv_bias=True).eval().to(dtype), torch.randn(*shape, 128).to(dtype)
    with pytest.MonkeyPatch.context() as patch, use_backend(attention="cuda", attention_packed="cuda"):
        stand_in(patch, cuda_on_cpu.library)  # put back before the way of Hopper's kernels is closed
        for _ in range(2):
            assert_as_by_ops(made, x)
            assert_as_by_ops(of_class_token(made), x)
    assert planned == [True] * 4


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads", "dim"), [(1, 197, 12, 64), (2, 577, 12, 64), (3, 50, 3, 80)])
def test_the_parameters_of_what_triton_compiles(batch, length, heads, dim, class_token):
    """compiled_kernel.h passes what the binary's entry lists: five pointers, the numbers, two areas of scratch."""
    from fastvit.block_plan import plan
    from fastvit.kernels import _launch, attention, attention_few

    parts = SimpleNamespace(qkv=(torch.empty(3 * heads * dim, 8, dtype=BF16), None), heads=(heads, 0.0, 0.125))
    given = plan.empty_heads(parts, torch.empty(batch, length, 8), class_token)
    q, k, v = given if class_token else reference.unpack_qkv(*given, heads)
    out, lse = attention_few._results(q)
    limits = () if class_token else (_launch.Limits.of_arch(90),)
    launch = (attention_few if class_token else attention)._fwd_launch(q, k, v, out, lse, 0.125, *limits)
    compiled = launch.aot_case("").compile(90)
    compiled.function = 7
    replay = _launch.Replay.of(launch, compiled)
    function, x, y, z, threads, shared, count = struct.unpack_from("=Q6I", replay.packed())
    entry = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)[1]
    kinds = {"i32": "u32", "i64": "u64", "fp32": "f32"}
    numbers = [kinds[kind] for kind in compiled.src.signature.values() if kind in kinds]
    assert re.findall(r"\.param \.(\w+)", entry) == ["u64"] * 5 + numbers + ["u64"] * 2
    assert (function, x, y, z, count) == (7, *launch.grid, *(1,) * (3 - len(launch.grid)), len(numbers))
    assert f".reqntid {threads}" in compiled.asm["ptx"]
    assert shared == compiled.metadata.shared


def test_another_triton_or_no_products(planned, monkeypatch):
    from fastvit.kernels import _launch

    made, x = block(), tokens(BF16)
    monkeypatch.setattr(_launch, "REPLAYED", False)
    for _ in range(3):
        assert_as_by_ops(made, x)
    assert planned == []
    assert list(block_plan._plans.values()) == [None]


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(block_plan, "_MOST_KEPT", 3)
    made = block()
    for length in range(5, 13):
        x = torch.randn(1, length, WIDTH).to(BF16)
        made(x), made(x)
        assert 1 <= len(block_plan._plans) <= 3


def test_another_thread_clears_the_plans(planned, monkeypatch):
    class Cleared(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    made, x = warmed()
    monkeypatch.setattr(block_plan, "_plans", Cleared(block_plan._plans))
    for _ in range(2):
        made(x)
    assert planned == [True] * 4


def test_a_plan_of_another_layout_is_left():
    made, x = warmed()
    expected = made(x)
    for key, plan in block_plan._plans.items():
        block_plan._plans[key] = plan._replace(arguments=(plan.arguments[0][:-8],))
    assert torch.equal(made(x), expected)


def test_an_error_of_a_launch_is_no_misfit(monkeypatch):
    made, x = warmed()
    monkeypatch.setenv(cuda_on_cpu.FAILURE, "701")
    with pytest.raises(RuntimeError, match="block: too many resources requested for launch"):
        made(x)
