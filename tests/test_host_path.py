"""What is remembered between calls is never stale: verdicts of the ops, a block read in one pass, launches."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastvit
from fastvit import fused, layers, ops
from fastvit.block_parts import read_block
from fastvit.dispatch import OPS, Unsupported, recording, use_backend
from fastvit.ops import _register

WIDTH, HEADS = 64, 2


def block(**options):
    torch.manual_seed(0)
    return layers.Block(WIDTH, HEADS, qkv_bias=True, **options).eval()


def tokens(dtype=torch.float32):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_modules(made, x):
    """The block's forward by its modules alone."""
    attn, mlp = made.attn, made.mlp
    q, k, v = attn.qkv(made.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    attended = nn.functional.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    x = x + made.drop_path1(made.ls1(attn.proj_drop(attn.proj(attended.transpose(1, 2).flatten(2)))))
    return x + made.drop_path2(made.ls2(mlp.drop2(mlp.fc2(mlp.drop1(mlp.act(mlp.fc1(made.norm2(x))))))))


class Doubled(nn.Linear):
    """A linear layer whose weight is not what ``_parameters`` holds."""

    @property
    def weight(self):
        return 2 * self._parameters["weight"]


class Twice(nn.Module):
    def forward(self, value):
        return 2 * value


CHANGES = {
    "replaced layer": lambda b: setattr(b.attn, "proj", nn.Linear(WIDTH, WIDTH)),
    "replaced parameter": lambda b: setattr(b.mlp.fc1, "weight", nn.Parameter(torch.randn(4 * WIDTH, WIDTH))),
    "other values": lambda b: b.attn.qkv.weight.data.copy_(torch.randn(3 * WIDTH, WIDTH)),
    "other activation": lambda b: setattr(b.mlp, "act", nn.GELU(approximate="tanh")),
    "activation's setting": lambda b: setattr(b.mlp.act, "approximate", "tanh"),
    "unknown activation": lambda b: setattr(b.mlp, "act", nn.Tanh()),
    "other eps": lambda b: setattr(b.norm2, "eps", 0.5),
    "no bias": lambda b: setattr(b.attn.proj, "bias", None),
    "layer scale": lambda b: setattr(b, "ls1", layers.LayerScale(WIDTH, init_values=0.3)),
    "head norms": lambda b: (
        setattr(b.attn, "q_norm", nn.LayerNorm(WIDTH // HEADS)), setattr(b.attn, "k_norm", nn.LayerNorm(WIDTH // HEADS))
    ),
    "norm without parameters": lambda b: setattr(b, "norm1", nn.LayerNorm(WIDTH, elementwise_affine=False)),
    "parametrised weight": lambda b: parametrize.register_parametrization(b.mlp.fc2, "weight", Twice()),
    "parametrised bias": lambda b: parametrize.register_parametrization(b.attn.qkv, "bias", Twice()),
    "weight by a property": lambda b: setattr(b.mlp.fc1, "__class__", Doubled),
    "replaced forward": lambda b: setattr(b.norm1, "forward", lambda x: x + 1),
    "new hook dictionary": lambda b: setattr(b.norm2, "_forward_hooks", {7: lambda module, args, out: out + 1}),
    "wider": lambda b: (
        setattr(b.mlp, "fc1", nn.Linear(WIDTH, 8 * WIDTH)), setattr(b.mlp, "fc2", nn.Linear(8 * WIDTH, WIDTH))
    ),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_counts(change, grad):
    made, x = block(), tokens()
    with torch.set_grad_enabled(grad):
        before = made(x)
        CHANGES[change](made)
        after, expected = made(x), by_modules(made, x)
        first_token = fused.class_token_block_forward(made, x)
    assert not torch.allclose(after, before, atol=1e-6)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first_token, expected[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_after_the_first_call_is_called(kind):
    made, x, calls = block(), tokens(), []
    for name, module in made.named_modules():
        if name == "attn.attn_drop":  # stock's fused attention does not call it either
            continue
        made(x.requires_grad_()).sum().backward()
        register = getattr(module, f"register_{kind}_hook")
        handle = register(lambda module, *args, name=name: calls.append(name))
        made(x.requires_grad_()).sum().backward()
        assert name in calls, name
        handle.remove()
        calls.clear()
        made(x)
        assert calls == []


def test_training_and_back():
    made = block(drop_path=0.5)
    made.mlp.drop1.p = made.attn.attn_drop.p = 0.5
    x = tokens()
    evaluated = made(x)
    torch.testing.assert_close(evaluated, by_modules(made, x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), evaluated)
    with recording() as calls:
        made.train()(x)
    assert "layernorm_mlp" not in dict(calls), "its dropout is active"


def test_another_dtype_and_a_wrong_one():
    made = block()
    made(tokens())
    assert made.bfloat16()(tokens(torch.bfloat16)).dtype == torch.bfloat16
    made.mlp.fc1.float()
    with pytest.raises(ValueError, match=r"fc1_weight is torch\.float32, expected torch\.bfloat16"):
        made(tokens(torch.bfloat16))
    made.bfloat16()
    made.mlp.fc1.weight.data = torch.randn(4 * WIDTH, WIDTH + 1).bfloat16()
    with pytest.raises(ValueError, match="fc1_weight has shape"):
        made(tokens(torch.bfloat16))


def test_a_choice_inside_and_after():
    made, x = block(), tokens()

    def backends():
        with recording() as calls:
            made(x)
        return {name for _, name in calls}

    made(x), made(x)
    usual = backends()
    with use_backend("reference"):
        made(x)
        assert backends() == {"reference"}
        with use_backend("cuda"), pytest.raises(Unsupported, match="cuda"):
            made(x)
        assert backends() == {"reference"}
    assert backends() == usual
    if usual != {"torch"}:
        with use_backend("torch"):
            made(x)  # known from here on
        assert backends() == usual


def test_autocast_comes_and_goes():
    made, x = block(), tokens()
    with torch.no_grad():
        exact = made(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, again = made(x), made(x)
        assert torch.equal(made(x), exact)
    assert torch.equal(rounded, again)
    assert not torch.equal(rounded, exact)


def test_a_gradient_that_is_refused_later():
    """The same shapes with and without requires_grad are two calls."""
    x, weight = tokens(), torch.randn(WIDTH, WIDTH)
    ops.linear_residual(x, weight, None, x, row_scale=torch.ones(2))
    with pytest.raises(ValueError, match="row_scale requires a gradient"):
        ops.linear_residual(x, weight, None, x, row_scale=torch.ones(2, requires_grad=True))


def test_a_refusal_is_said_again():
    """A call that fell back with a warning is judged anew each time."""
    x = tokens(torch.float64)
    for _ in range(2):
        fastvit.dispatch._warned.clear()
        if fastvit._extension.cpp() is not None:
            with pytest.warns(UserWarning, match="x is torch.float64"):
                ops.linear_residual(x, torch.randn(WIDTH, WIDTH).double(), None, x)


def test_what_is_kept_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(fastvit.dispatch, "_MOST_SETTLED", 3)
    op = fastvit.dispatch.OPS["linear_residual"]
    for rows in range(1, 9):
        ops.linear_residual(torch.randn(rows, WIDTH), torch.randn(8, WIDTH), None, torch.randn(rows, 8))
        assert 1 <= len(op._settled) <= 3 or rows == 1


def test_a_backend_that_was_replaced_does_not_run(monkeypatch):
    op, x, weight = OPS["layernorm_linear"], torch.randn(3, 16), torch.randn(8, 16)
    right = ops.layernorm_linear(x, None, None, weight, None)
    stand_in = dataclasses.replace(op.backends["torch"], run=lambda *args: right + 1)
    with monkeypatch.context() as patch:
        patch.setattr(op, "backends", {**op.backends, "torch": stand_in})
        with use_backend("torch"):
            assert torch.equal(ops.layernorm_linear(x, None, None, weight, None), right + 1)
            assert torch.equal(ops.layernorm_linear(x, None, None, weight, None), right + 1)
    with use_backend("torch"):
        torch.testing.assert_close(ops.layernorm_linear(x, None, None, weight, None), right)


def test_a_block_with_one_module_more_is_looked_at():
    made = block()
    assert read_block(made) is not None
    made.attn.extra = nn.Linear(2, 2)
    assert read_block(made) is None
    assert read_block(nn.Linear(2, 2)) is None


def test_results_may_be_written_to():
    """As after torch.library's own autograd: no view that a custom function made."""
    x = tokens().requires_grad_()
    out = ops.layernorm_linear(x, None, None, torch.randn(WIDTH, WIDTH))
    out.add_(x)
    out.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        out = ops.layernorm_linear(x, None, None, torch.randn(WIDTH, WIDTH))
    out.add_(x)
    assert out.requires_grad


def test_the_short_way_has_the_gradients_of_the_long_one(monkeypatch):
    made, x = block(init_values=0.3), tokens().requires_grad_()
    found = []
    for watched in (False, True):
        if watched:
            monkeypatch.setattr(_register, "_is_watched", lambda args: True)
        out = made(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *made.parameters()])])
    for short, long in zip(*found, strict=True):
        assert torch.equal(short, long)


class Kernel:
    """Stands for a Triton kernel: it copies the arguments of each call, and compiles to what does the same."""

    params = tuple(SimpleNamespace(name=name) for name in ("x_ptr", "out_ptr", "rows", "BLOCK"))

    def __init__(self):
        self.launched, self.replayed = [], []
        self.compiled = SimpleNamespace(function=5, packed_metadata=(4, 1, 0), run=lambda *a: self.replayed.append(a))

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launched.append((grid, args, options))
            return self.compiled

        return launch


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from fastvit.kernels import _launch

    monkeypatch.setattr(_launch, "_kept", {})
    monkeypatch.setattr(_launch, "REPLAYED", True)
    monkeypatch.setattr(_launch, "current_device", lambda: None)
    monkeypatch.setattr(_launch, "current_stream", lambda device: 9)
    return _launch


def _run(launches, kernel, x, out):
    def build():
        return [launches.Launch(kernel, (3,), (x, out, x.shape[0]), {"BLOCK": 16}, num_warps=4, num_stages=1)]

    pointers = {"x": x.data_ptr(), "out": out.data_ptr()}
    launches.run(("copy", launches.facts((x, out))), x.device, pointers, build)


def test_a_launch_is_replayed_on_other_tensors(launches):
    kernel, (x, out) = Kernel(), torch.randn(2, 8, 16)
    _run(launches, kernel, x, out)
    assert len(kernel.launched) == 1
    other, target = torch.randn(2, 8, 16)
    _run(launches, kernel, other, target)
    assert len(kernel.launched) == 1
    expected = (3, 1, 1, 9, 5, (4, 1, 0), None, None, None, other.data_ptr(), target.data_ptr(), 8, 16)
    assert kernel.replayed == [expected]


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "alignment"])
def test_a_launch_of_another_kind_is_made(launches, change):
    kernel, memory = Kernel(), torch.zeros(64, 16)
    x, out = memory[:8], torch.zeros(8, 16)
    _run(launches, kernel, x, out)
    other = {
        "shape": memory[:7],
        "stride": memory[:16:2],
        "dtype": x.int(),
        "alignment": memory.view(-1)[1:129].view(8, 16),
    }[change]
    _run(launches, kernel, other, out)
    assert len(kernel.launched) == 2
    assert kernel.replayed == []


def test_launches_go_through_triton_where_they_must(launches, monkeypatch):
    """Under a profiler's hook, on another current device, with a version whose binaries are called otherwise."""
    kernel, (x, out) = Kernel(), torch.randn(2, 8, 16)
    hook = launches.triton.knobs.runtime.launch_enter_hook
    _run(launches, kernel, x, out)
    hook.add(print)
    try:
        _run(launches, kernel, x, out)
    finally:
        hook.remove(print)
    monkeypatch.setattr(launches, "current_device", lambda: 1)
    _run(launches, kernel, x, out)
    monkeypatch.setattr(launches, "current_device", lambda: None)
    assert len(kernel.launched) == 3
    assert kernel.replayed == []
    launches._kept.clear()
    monkeypatch.setattr(launches, "REPLAYED", False)
    _run(launches, kernel, x, out)
    _run(launches, kernel, x, out)
    assert len(kernel.launched) == 5
    assert kernel.replayed == []


def test_interpreted_launches_are_not_kept(launches):
    kernel, (x, out) = Kernel(), torch.randn(2, 8, 16)
    kernel.compiled = None
    _run(launches, kernel, x, out)
    assert launches._kept == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_replay_gives_every_argument_its_place(dtype):
    """Of the attention's own launches: in the order of the kernel's parameters, the pointers by their names."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastvit.kernels._configs import Limits

    from fastvit.kernels import _launch, attention

    qkv = torch.empty(2, 197, 3, 12, 64, dtype=dtype, device="meta")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, lse = torch.empty_like(q), attention.new_statistics(q, q.shape[:3])
    grads = [torch.empty_like(q) for _ in range(3)]
    device = Limits.of_arch(90)
    made = [attention._fwd_launch(q, k, v, out, lse, 0.125, device)]
    made += attention._bwd_launches(out, q, k, v, out, lse, 0.125, *grads, device)
    known = {"q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "delta"}
    for launch in made:
        replay = _launch.Replay.of(launch, None)
        names = [param.name for param in launch.kernel.params]
        given = dict(zip(names, launch.arguments, strict=False)) | launch.constexprs
        assert set(replay.names) <= known
        assert [f"{name}_ptr" for name in replay.names] == names[: len(replay.names)]
        assert list(replay.rest) == [given[name] for name in names[len(replay.names) :]]
