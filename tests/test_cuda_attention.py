"""Hopper's attention (csrc/cuda/sm90/attention.cuh) against float64.

Where torch.cuda.is_available() on compute capability 9.0 the kernel runs; everywhere else its own source runs on a
model of Hopper's instructions (hopper_model.h), in orders from as late to as early as a GPU may take them.
"""

import subprocess

import cuda_on_cpu
import pytest
import torch
from hopper_attention import (
    BF16,
    DIM,
    F16,
    F32,
    HAS_KERNEL,
    INSTRUCTIONS,
    OP,
    ORDER,
    draw,
    is_found_without,
    ops_of,
    packed,
    prove,
    stand_in,
)

import fastvit
from fastvit import dispatch, reference
from fastvit.ops import _sm90

LENGTHS = [1, 5, 64, 65, 128, 129, 197, 208, 256, 257, 272]


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.skipif(not HAS_KERNEL, reason="runs on a GPU of capability 9.0")),
        pytest.param("cpu", marks=pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())),
    ]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What the kernel leaves out shows, instead of what an earlier test has left there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu"])
def emulated(request):
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    return cuda_on_cpu.attention()


def many(device):
    """Samples of three heads each, so that a block of the grid takes more heads than it has stages."""
    return 300 if device == "cuda" else 3


def prove_packed(ops, qkv, heads, scale=DIM**-0.5):
    out, lse = ops.attention_packed_fwd(qkv, heads, scale)
    prove(out.unflatten(-1, (heads, -1)), lse, *reference.unpack_qkv(qkv, heads), scale)


@pytest.mark.parametrize(("tokens", "dim"), [*((n, 64) for n in LENGTHS), *((n, 80) for n in (5, 128, 197, 257))])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_packed(device, dtype, tokens, dim):
    """More heads than blocks of the grid, so that every stage is filled more than once."""
    prove_packed(ops_of(device), packed(many(device), tokens, 3, dtype, device, dim=dim), 3)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize(("tokens", "dim"), [(130, 64), (197, 64), (250, 64), (257, 64), (197, 80)])
def test_one_head(device, monkeypatch, tokens, dim, order):
    """Whose queries several blocks share, each with the keys and values; other heads beside it change no bit."""
    monkeypatch.setenv(ORDER, str(order))
    qkv = packed(1, tokens, 1, device=device, dim=dim)
    prove_packed(ops_of(device), qkv, 1, dim**-0.5)
    alone, lse = ops_of(device).attention_packed_fwd(qkv, 1, 0.125)
    among, lse_among = ops_of(device).attention_packed_fwd(qkv.expand(3, -1, -1).contiguous(), 1, 0.125)
    assert torch.equal(alone[0], among[1])
    assert torch.equal(lse[0], lse_among[1])


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize(("tokens", "dim"), [(197, 64), (257, 64), (257, 80)])
def test_heads_in_shares(emulated, monkeypatch, tokens, dim, order):
    """On more multiprocessors, as a GPU has them: of five blocks of queries, a third share has one that is empty."""
    monkeypatch.setenv(ORDER, str(order))
    monkeypatch.setenv(cuda_on_cpu.MORE, "9")
    prove_packed(emulated, packed(1, tokens, 3, dim=dim), 3)


@pytest.mark.parametrize("order", [1, *range(2, 10)])
@pytest.mark.parametrize(
    ("tokens", "dim"), [*((n, 64) for n in (37, 150, 197, 250, 257)), (70, 80), (160, 80), (257, 80)]
)
def test_in_every_order(emulated, monkeypatch, tokens, dim, order):
    """From one stage to four, from one block of queries in a head to five."""
    monkeypatch.setenv(ORDER, str(order))
    prove_packed(emulated, packed(3, tokens, 3, dim=dim), 3)


@pytest.mark.parametrize("instruction", [*INSTRUCTIONS, "give_registers"])
def test_every_instruction_is_needed(emulated, monkeypatch, instruction):
    """The model is strict enough to tell."""
    assert is_found_without(instruction, monkeypatch, lambda: prove_packed(emulated, packed(3, 197, 3), 3))


@pytest.mark.parametrize("place", ["cpu"])
def test_layouts_are_those_of_cutlass(place, tmp_path):
    """Swizzled tiles and fragments as the model has them from the PTX manual, and as CUTLASS's own types say."""
    if cuda_on_cpu.why_not() or cuda_on_cpu.cutlass_headers() is None:
        pytest.skip(cuda_on_cpu.why_not() or "CUTLASS is not installed")
    cuda_on_cpu.compile_program("hopper_layouts.cpp", tmp_path / "layouts", cuda_on_cpu.cutlass_headers())
    done = subprocess.run([tmp_path / "layouts"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("scale", [1e-3, 8.0, 30.0])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_magnitudes(device, dtype, scale):
    """Scores in the thousands, all of one row below zero, and values near the largest of float16."""
    ops = ops_of(device)
    prove_packed(ops, packed(2, 197, 2, dtype, device, scale=scale), 2)
    qkv = packed(1, 70, 2, dtype, device)
    q, k, v = reference.unpack_qkv(qkv, 2)
    k.copy_(-q.mean(2, keepdim=True).sign() * 3), q.copy_(q.abs() * q.mean(2, keepdim=True).sign()), v.mul_(1e4)
    prove_packed(ops, qkv, 2)


def test_neighbours_stay_out(device):
    """Rows past the last token are not the next sample's: NaN there would show, whatever its weight."""
    for tokens in (5, 197):
        qkv = packed(3, tokens, 2, device=device)
        qkv[1] = float("nan")
        out, lse = ops_of(device).attention_packed_fwd(qkv, 2, 0.125)
        kept = [0, 2]
        heads = reference.unpack_qkv(qkv[kept], 2)
        prove(out[kept].unflatten(-1, (2, DIM)), lse[kept], *heads)
        assert out[1].isnan().all()


def test_strides(device):
    """A slice of wider rows, samples out of order, and separate q, k and v of other lengths."""
    wide = draw(5, 70, 3 * 2 * DIM + 24, device=device)
    prove_packed(ops_of(device), wide[::2, :, 8 : 8 + 3 * 2 * DIM], 2)
    for queries, keys in ((1, 197), (197, 193), (64, 5), (128, 65)):
        q = draw(2, queries, 3, DIM, device=device).transpose(1, 2)
        k, v = (draw(2, 3, keys, DIM + 8, device=device, seed=seed)[..., :DIM] for seed in (1, 2))
        out, lse = ops_of(device).attention_fwd(q, k, v, 0.2)
        assert out.shape == (2, queries, 3, DIM)
        prove(out, lse, q, k, v, 0.2)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(1, 50, 64), (1, 160, 64), (64, 257, 64), (1, 70, 80), (1, 197, 80), (64, 257, 80)]
)
def test_one_block_of_queries(device, monkeypatch, queries, keys, dim, order):
    """Then a head is one warpgroup's, and the next one the other's; from one stage to four, each filled again."""
    monkeypatch.setenv(ORDER, str(order))
    q = draw(many(device), queries, 3, dim, device=device).transpose(1, 2)
    k, v = (draw(many(device), 3, keys, dim, device=device, seed=seed) for seed in (1, 2))
    prove(*ops_of(device).attention_fwd(q, k, v, dim**-0.5), q, k, v, dim**-0.5)


def test_one_of_each(device):
    """Strides of dimensions of one may be anything, even what TMA cannot take."""
    q = draw(1, 1, 1, DIM, device=device).as_strided((1, 1, 1, DIM), (3, 0, 5, 1))
    prove(*ops_of(device).attention_fwd(q, q, q, 0.125), q, q, q)


def test_the_op_copies_what_tma_cannot_read(emulated, monkeypatch):
    stand_in(monkeypatch)
    wide = draw(2, 20, 3 * DIM + 4)
    for qkv in (
        wide[..., 4:],
        wide[..., : 3 * DIM],
        draw(2, 20, 6 * DIM)[..., ::2],
        draw(1, 20, 3 * DIM).expand(2, -1, -1),
    ):
        out, lse = OP._packed_fwd(qkv, 1, 0.125, "cuda")
        prove(out.unflatten(-1, (1, DIM)), lse, *reference.unpack_qkv(qkv.contiguous(), 1))
    taken = packed(2, 20, 1)
    assert _sm90.for_tma(taken) is taken


def test_auto_passes_it_by(emulated, monkeypatch):
    stand_in(monkeypatch)
    qkv = packed(1, 20, 1)
    refused = dispatch.OPS["attention_packed"].explain(qkv, 1, 0.0, 0.125)["cuda"]
    assert len(refused) == 1
    assert refused[0].startswith("it runs only by name, as with use_backend(attention_packed='cuda'): ")
    with dispatch.recording() as calls:
        fastvit.ops.attention_packed(qkv, 1)
    assert calls[0][1] != "cuda"
    with fastvit.use_backend(attention_packed="cuda"):
        assert dispatch.OPS["attention_packed"].explain(qkv, 1, 0.0, 0.125)["cuda"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dropout_p": 0.1}, "no masks, causal order, dropout, norms or rotation"),
        ({"is_causal": True}, "no masks, causal order, dropout, norms or rotation"),
        ({"q": (1, 2, 65, DIM)}, "there are 65 queries, Hopper's attention takes 64 beside 20 keys"),
        ({"q": (1, 2, 20, 32), "k": (1, 2, 20, 32)}, "the head dim is 32, Hopper's attention takes 64 and 80"),
        ({"k": (1, 2, 273, DIM)}, "there are 273 keys, Hopper's attention takes up to 272"),
        ({"scale": 0.0}, "scale is 0.0, Hopper's attention takes one above 0"),
        ({"dtype": F32}, "q is torch.float32, Hopper's attention takes bfloat16 and float16"),
    ],
)
def test_why_not(emulated, monkeypatch, change, said):
    stand_in(monkeypatch)
    dtype = change.pop("dtype", BF16)
    sizes = {"q": (1, 2, 20, DIM), "k": (1, 2, 20, DIM)}
    q, k = (draw(*change.pop(name, size), dtype=dtype) for name, size in sizes.items())
    with fastvit.use_backend(attention="cuda"), pytest.raises(fastvit.Unsupported) as error:
        fastvit.ops.attention(q, k, k, **change)
    assert said in str(error.value)


def test_nothing(device):
    ops = ops_of(device)
    out, lse = ops.attention_packed_fwd(packed(0, 7, 2, device=device), 2, 0.125)
    assert (out.shape, lse.shape) == ((0, 7, 2 * DIM), (0, 2, 7))


def test_runs_are_the_same(device):
    qkv = packed(many(device), 197, 3, device=device)
    runs = [ops_of(device).attention_packed_fwd(qkv, 3, 0.125) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: packed(1, 273, 2, device=d), "there are 273 keys, expected 1 to 272"),
        (lambda d: packed(1, 0, 2, device=d), "there are 0 keys, expected 1 to 272"),
        (lambda d: packed(1, 8, 2, F32, d), "qkv is float32, expected 16 bits"),
        (lambda d: packed(1, 8, 1, device=d), "the head dim is 32, expected 64 or 80"),
        (lambda d: draw(1, 8, 390, device=d)[..., 1:385], "qkv is misaligned"),
        (lambda d: draw(1, 8, 388, device=d)[..., :384], "qkv is misaligned"),
        (lambda d: draw(1, 8, 768, device=d)[..., ::2], "expected 1 for the last dimension"),
        (lambda d: draw(1, 1, 384, device=d).expand(1, 8, 384), "qkv is misaligned"),
        (lambda d: draw(8, 384, device=d), "expected (batch, tokens, 3 * 2 heads * head dim)"),
    ],
)
def test_refused(device, make, said):
    with pytest.raises(RuntimeError, match="attention_packed: ") as error:
        ops_of(device).attention_packed_fwd(make(device), 2, 0.125)
    assert said in str(error.value)


def test_more_queries_than_blocks_of_keys_are_refused(device):
    q, k = draw(1, 2, 65, DIM, device=device), draw(1, 2, 64, DIM, device=device)
    with pytest.raises(RuntimeError, match="there are 65 queries, expected at most 64 beside 64 keys"):
        ops_of(device).attention_fwd(q, k, k, 0.125)
