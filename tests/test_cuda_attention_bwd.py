"""Gradients of Hopper's attention (csrc/cuda/sm90/attention_bwd.cuh) against float64.

Where torch.cuda.is_available() on compute capability 9.0 the kernel runs; everywhere else its own source runs on a
model of Hopper's instructions (hopper_model.h), in orders from as late to as early as a GPU may take them.
"""

import cuda_on_cpu
import pytest
import torch
from hopper_attention import (
    BF16,
    DIM,
    F16,
    HAS_BWD,
    INSTRUCTIONS,
    OP,
    ORDER,
    draw,
    inputs_of_bwd,
    is_found_without,
    ops_of,
    prove_bwd,
    stand_in,
)

import fastvit
from fastvit import reference


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.skipif(not HAS_BWD, reason="runs on a GPU of capability 9.0")),
        pytest.param("cpu", marks=pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())),
    ]
)
def device(request):
    return request.param


@pytest.fixture(params=["cpu"])
def emulated(request):
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    return cuda_on_cpu.attention()


def draw_all(batch, heads, queries, keys=None, dtype=BF16, device="cpu", scale=1.0):
    """q, k, v and dout"""
    lengths = (queries, keys or queries, keys or queries, queries)
    scales = (scale, scale, scale, 1.0)
    return [
        draw(batch, heads, length, DIM, dtype=dtype, device=device, scale=of, seed=seed)
        for seed, (length, of) in enumerate(zip(lengths, scales, strict=True))
    ]


def run_bwd(ops, q, k, v, dout, scale=DIM**-0.5):
    """dq, dk and dv; what the kernel leaves out is NaN."""
    grads = [torch.full_like(t, float("nan")) for t in (q, k, v)]
    ops.attention_bwd(*grads, *inputs_of_bwd(q, k, v, dout, scale))
    return grads


def prove_one(ops, *sizes, scale=DIM**-0.5, **options):
    inputs = draw_all(*sizes, **options)
    prove_bwd(run_bwd(ops, *inputs, scale), *inputs, scale)


@pytest.mark.parametrize("tokens", [2, 5, 64, 65, 127, 128, 129, 160, 192, 193, 197, 208, 209, 250, 256])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_lengths(device, dtype, tokens):
    """More than two heads for a block of the grid, so that each place is filled more than once."""
    heads = 3 if device == "cpu" else 134
    prove_one(ops_of(device), 3, heads, tokens, dtype=dtype, device=device)


def test_one_token(device):
    """Its weight is 1 whatever q and k are: what is left of their gradients is the rounding of sums in float32."""
    inputs = draw_all(2, 2, 1, device=device)
    dq, dk, dv = run_bwd(ops_of(device), *inputs)
    assert torch.equal(dv, inputs[3])
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("order", range(10))
@pytest.mark.parametrize("tokens", [37, 128, 197, 250])
def test_in_every_order(emulated, monkeypatch, tokens, order):
    """One block of queries in a head to four, with one and two heads' keys on the chip."""
    monkeypatch.setenv(ORDER, str(order))
    prove_one(emulated, 2, 3, tokens)


@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(37, 65), (300, 70), (129, 128), (1, 208), (197, 197), (65, 250)])
def test_no_order_changes_a_bit(emulated, monkeypatch, queries, keys, multiprocessors):
    """Up to seven heads for a block of the grid."""
    monkeypatch.setenv(cuda_on_cpu.MORE, str(multiprocessors))
    inputs, runs = draw_all(1, 7, queries, keys), []
    for order in (1, 0, *range(100, 106)):
        monkeypatch.setenv(ORDER, str(order))
        runs.append(run_bwd(emulated, *inputs))
    prove_bwd(runs[0], *inputs)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("instruction", [*INSTRUCTIONS, "show_writes"])
def test_every_instruction_is_needed(emulated, monkeypatch, instruction):
    """The model is strict enough to tell."""
    assert is_found_without(instruction, monkeypatch, lambda: prove_one(emulated, 2, 3, 197))


@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (300, 70), (7, 256), (64, 129), (197, 208)])
def test_other_lengths(device, queries, keys):
    """Fewer queries than keys, and more than a head of them has blocks."""
    prove_one(ops_of(device), 2, 2, queries, keys, device=device, scale=0.2)


@pytest.mark.parametrize("scale", [1e-3, 4.0])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_magnitudes(device, dtype, scale):
    inputs = draw_all(1, 2, 197, dtype=dtype, device=device, scale=scale)
    prove_bwd(run_bwd(ops_of(device), *inputs), *inputs)


def test_scores_far_below_zero(device):
    """Keys past the last one would weigh infinitely much here: their scores are zeros."""
    q, k, v, dout = draw_all(1, 2, 197, device=device)
    k.copy_(-q.mean(2, keepdim=True).sign() * 3), q.copy_(q.abs() * q.mean(2, keepdim=True).sign() * 8)
    k[:, :, 3] += 0.5
    grads = run_bwd(ops_of(device), q, k, v, dout)
    assert all(grad.isfinite().all() for grad in grads)
    prove_bwd(grads, q, k, v, dout)


def test_neighbours_stay_out(device):
    """Rows past the last token are not the next sample's: NaN there would show."""
    for tokens in (5, 197):
        inputs = draw_all(3, 2, tokens, device=device)
        for t in inputs:
            t[1] = float("nan")
        grads = run_bwd(ops_of(device), *inputs)
        prove_bwd([grad[::2] for grad in grads], *(t[::2] for t in inputs))
        assert all(grad[1].isnan().all() for grad in grads)


def test_packed_strides(device):
    """In and out of packed projections, dout of wider rows, samples out of order; nothing beside them is touched."""
    heads, tokens = 2, 70
    qkv = draw(5, tokens, 3 * heads * DIM + 24, device=device)[::2, :, 8 : 8 + 3 * heads * DIM]
    dout = draw(3, tokens, heads * DIM + 8, device=device, seed=1)[..., : heads * DIM]
    inputs = [*reference.unpack_qkv(qkv, heads), dout.unflatten(-1, (heads, DIM)).transpose(1, 2)]
    wide = torch.full((3, tokens + 1, 3 * heads * DIM + 8), 7.0, dtype=BF16, device=device)
    grads = reference.unpack_qkv(wide[:, :tokens, 8:], heads)
    ops_of(device).attention_bwd(*grads, *inputs_of_bwd(*inputs))
    prove_bwd(grads, *inputs)
    assert (wide[:, tokens] == 7).all()
    assert (wide[..., :8] == 7).all()


def test_runs_and_batches_give_the_same_bits(device):
    one = draw_all(1, 1, 197, device=device)
    alone = run_bwd(ops_of(device), *one)
    among = run_bwd(ops_of(device), *(t.expand(3, 2, -1, -1).contiguous() for t in one))
    again = run_bwd(ops_of(device), *one)
    for a, b, c in zip(alone, among, again, strict=True):
        assert torch.equal(a[0, 0], b[2, 1])
        assert torch.equal(a, c)


@pytest.mark.parametrize("tokens", [70, 197])
def test_the_op(emulated, monkeypatch, tokens):
    """Forward and backward by name, packed and not, through what TMA cannot read too; Triton is not asked."""
    stand_in(monkeypatch)
    monkeypatch.setattr(OP, "_kernels", None)
    for qkv in (draw(2, tokens, 3 * DIM), draw(2, tokens, 3 * DIM + 4)[..., 4:]):
        leaf, heads = qkv.requires_grad_(), reference.unpack_qkv(qkv.detach(), 1)
        with fastvit.use_backend(attention="cuda", attention_packed="cuda"):
            out = fastvit.ops.attention_packed(leaf, 1)
            dout = draw(*out.shape, seed=3)[..., ::1]
            (grad,) = torch.autograd.grad(out, leaf, dout)
            leaves = [t.requires_grad_() for t in heads]
            apart = torch.autograd.grad(fastvit.ops.attention(*leaves), leaves, dout[:, None])
        dout = dout.unflatten(-1, (1, DIM)).transpose(1, 2)
        prove_bwd(reference.unpack_qkv(grad, 1), *(t.detach() for t in heads), dout)
        assert all(torch.equal(a, b) for a, b in zip(reference.unpack_qkv(grad, 1), apart, strict=True))


@pytest.mark.parametrize(("tokens", "dim"), [(50, 64), (257, 64), (197, 80)])
def test_other_sizes_are_left_to_triton(emulated, monkeypatch, tokens, dim):
    stand_in(monkeypatch)
    asked = []
    monkeypatch.setattr(OP, "_kernels", lambda q: (None, lambda *args: asked.append(args)))
    qkv = draw(1, tokens, 3 * dim)
    out, lse = OP._packed_fwd(qkv, 1, 0.125, "cuda")
    OP._packed_bwd(torch.ones_like(out), qkv, out, lse, 1, 0.125, "cuda")
    assert len(asked) == 1


def test_no_heads(device):
    inputs = draw_all(0, 2, 70, device=device)
    assert [grad.shape for grad in run_bwd(ops_of(device), *inputs)] == [t.shape for t in inputs[:3]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": 257}, "there are 257 keys, expected 1 to 256"),
        ({"dim": 80}, "the head dim is 80, expected 64"),
        ({"dq": lambda t: t.float()}, "dq is float32, expected 16 bits"),
        ({"dout": lambda t: t.half()}, "dout and q have two dtypes, expected one"),
        ({"out": lambda t: t[:, :, :-1]}, "out has shape (1, 2, 69, 64), expected (batch, heads, tokens, head dim)"),
        ({"dk": lambda t: torch.empty(1, 2, 70, 65, dtype=BF16, device=t.device)[..., 1:]}, "dk is misaligned"),
        ({"dv": lambda t: t.mT.contiguous().mT}, "expected 1 for the last dimension"),
        ({"lse": lambda t: t.half()}, "expected contiguous float32 (batch, heads, queries)"),
        ({"lse": lambda t: t[..., :-1]}, "lse has shape (1, 2, 69)"),
        ({"scale": lambda t: -1.0}, "expected a number > 0"),
    ],
)
def test_refused(device, change, said):
    change = dict(change)
    keys, dim = change.pop("keys", 70), change.pop("dim", DIM)
    q, k, v, dout = (draw(1, 2, n, dim, device=device, seed=n) for n in (70, keys, keys, 70))
    names = ("dq", "dk", "dv", "dout", "q", "k", "v", "out", "lse", "scale")
    arguments = dict(zip(names, (q.clone(), k.clone(), v.clone(), *inputs_of_bwd(q, k, v, dout)), strict=True))
    for name, other in change.items():
        arguments[name] = other(arguments[name])
    with pytest.raises(RuntimeError, match="attention: ") as error:
        ops_of(device).attention_bwd(*arguments.values())
    assert said in str(error.value)
