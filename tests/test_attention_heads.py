"""Norms and rotations of q and k: what they mean, against timm, and the backends that leave them to stock PyTorch."""

import pytest
import torch

from fastvit import _extension, ops, reference
from fastvit.dispatch import use_backend
from fastvit.reference import HeadNorm, Rope
from fastvit.testing import assert_as_accurate, cast_inputs, run_with_gradients


def heads(tokens=10, dim=16, dtype=torch.float32):
    return {name: torch.randn(2, 3, tokens, dim).to(dtype).requires_grad_() for name in "qkv"}


def table(tokens, dim, *leading):
    angles = torch.randn(*leading, tokens, dim) * 3
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("half", [True, False])
def test_a_rotation_is_timms(timm, half, dtype):
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    x, rope = torch.randn(2, 3, 10, 16).to(dtype), Rope(table(7, 16), 3, half)
    expected = torch.cat([x[:, :, :3], apply_rot_embed_cat(x[:, :, 3:], rope.table, half=half)], dim=2)
    assert torch.equal(reference.rotate_heads(x, rope), expected)
    assert torch.equal(reference.rotate_heads(x[:, :, :1], rope), x[:, :, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_is_timms(timm, dtype):
    x = torch.randn(2, 3, 10, 16).to(dtype)
    for norm, rms in ((timm.layers.LayerNorm(16, eps=1e-5), False), (timm.layers.RmsNorm(16, eps=1e-5), True)):
        norm = norm.to(dtype)
        torch.nn.init.normal_(norm.weight)
        given = HeadNorm(norm.weight, getattr(norm, "bias", None), norm.eps, rms)
        torch.testing.assert_close(reference.normalize_heads(x, given), norm(x))


@pytest.mark.parametrize("half", [True, False])
def test_rope_attention_is_timms(timm, half):
    from timm.layers.attention import AttentionRope

    attn = AttentionRope(48, 3, qk_norm=True, norm_layer=torch.nn.LayerNorm, num_prefix_tokens=2, rotate_half=half)
    x, rope = torch.randn(2, 10, 48), Rope(table(8, 16), 2, half)
    norms = {name: HeadNorm(m.weight, m.bias, m.eps) for name, m in (("q_norm", attn.q_norm), ("k_norm", attn.k_norm))}
    for backend in ("torch", "reference"):
        with use_backend(backend):
            tokens = ops.attention_packed(attn.qkv(x), 3, rope=rope, **norms)
        torch.testing.assert_close(attn.proj(tokens), attn(x, rope=rope.table))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpp_keeps_its_core(packed, dtype):
    if _extension.why_not_cpp():
        pytest.skip(_extension.why_not_cpp()[0])
    weights = {"weight": 1 + 0.3 * torch.randn(32), "bias": 0.3 * torch.randn(32)}
    weights = {name: t.to(dtype).requires_grad_() for name, t in weights.items()}
    rope = Rope(table(19, 32), 1, True)
    rows = {"qkv": torch.randn(2, 20, 3 * 2 * 32).to(dtype).requires_grad_()} if packed else heads(20, 32, dtype)
    fn = ops.attention_packed if packed else ops.attention

    def call(weight, bias, **rows):
        norm = HeadNorm(weight, bias)
        return fn(**rows, **({"num_heads": 2} if packed else {}), q_norm=norm, k_norm=norm, rope=rope)

    inputs = rows | weights
    dout = torch.randn(2, 20, 64) if packed else torch.randn(2, 3, 20, 32)
    results = []
    for backend, tensors in (("cpp", inputs), ("torch", inputs), ("reference", cast_inputs(inputs, torch.float64))):
        with use_backend(backend):
            results.append(run_with_gradients(call, tensors, dout))
    for name, value in results[0].items():
        assert_as_accurate(value, results[1][name], results[2][name], name)


BAD = {
    r"q_norm.weight has shape \(8,\), expected \(16,\) like the head dim of q": {"q_norm": HeadNorm(torch.ones(8))},
    r"k_norm.bias has shape \(16,\), expected none with rms": {"k_norm": HeadNorm(bias=torch.ones(16), rms=True)},
    r"rope.table has shape \(10, 32\), expected \(Nk - num_prefix, 2 \* D\) = \(9, 32\)": {
        "rope": Rope(table(10, 16), 1)
    },
    r"rope.table has shape \(4, 10, 32\), expected .* or one broadcastable to \(2, 3, 10, 32\)": {
        "rope": Rope(table(10, 16, 4))
    },
    r"rope.num_prefix is 11, expected 0 to 10": {"rope": Rope(table(10, 16), 11)},
}


@pytest.mark.parametrize("message", BAD)
def test_shapes_that_do_not_fit(message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        ops.attention(**heads(10, 16), **BAD[message])


def test_a_rotation_places_queries_like_keys():
    inputs = heads(10, 16)
    inputs |= {name: inputs[name][:, :, :4] for name in "kv"}
    with pytest.raises(ValueError, match="q has 10 tokens, expected at most 4 like k"):
        ops.attention(**inputs, rope=Rope(table(4, 16)))


def test_shapes_that_do_not_fit_a_packed_or_ragged_batch():
    with pytest.raises(ValueError, match=r"attention_packed: rope.table has shape \(3, 9, 32\)"):
        ops.attention_packed(torch.randn(2, 10, 3 * 48), 3, rope=Rope(table(9, 16, 3)))
    rows, where = torch.randn(10, 3, 16), (torch.tensor([0, 10]), 10)
    with pytest.raises(ValueError, match=r"attention_varlen: rope.num_prefix is 1, expected 0"):
        ops.attention_varlen(rows, rows, rows, *where, rope=Rope(table(9, 16), 1))
