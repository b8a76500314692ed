"""The reference operators against torch.nn, and their gradients in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit import reference
from fastvit.testing import Shape, make_inputs

TINY = Shape(embed_dim=24, num_heads=2, hidden_dim=40, tokens=5, patch_size=4, image_size=8)
DOUBLE = torch.float64


def test_patch_embed_is_conv_cls_and_positions():
    conv = nn.Conv2d(3, 24, 4, 4).double()
    images, cls, pos = torch.randn(2, 3, 8, 12, dtype=DOUBLE), torch.randn(1, 24), torch.randn(7, 24)
    cls, pos = cls.double(), pos.double()
    expected = torch.cat([cls.expand(2, 1, 24), conv(images).flatten(2).transpose(1, 2)], dim=1) + pos
    ours = reference.patch_embed(images, conv.weight, conv.bias, pos_embed=pos, prefix=cls)
    torch.testing.assert_close(ours, expected)


def test_patch_embed_positions_may_skip_the_prefix():
    inputs = make_inputs("patch_embed", TINY, 2, DOUBLE)
    full = reference.patch_embed(**inputs)
    patches_only = reference.patch_embed(**(inputs | {"pos_embed": inputs["pos_embed"][1:]}))
    torch.testing.assert_close(patches_only[:, 1:], full[:, 1:])
    torch.testing.assert_close(patches_only[:, :1], inputs["prefix"].expand(2, 1, -1))


def test_uint8_pixels_are_normalised():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.25, 0.3]).double()
    expected = (pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(reference.normalize_pixels(pixels, mean, std, DOUBLE), expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention_is_sdpa(mask):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=DOUBLE) for n in (5, 7, 7))
    options: dict = {"none": {}, "causal": {"is_causal": True}}.get(mask, {})
    if mask == "bool":
        options = {"attn_mask": torch.rand(2, 1, 5, 7) > 0.3}
        options["attn_mask"][..., 0] = True
    if mask == "float":
        options = {"attn_mask": torch.randn(5, 7, dtype=DOUBLE)}
    torch.testing.assert_close(
        reference.attention(q, k, v, **options, scale=0.3),
        F.scaled_dot_product_attention(q, k, v, **options, scale=0.3),
    )


def test_attention_of_a_fully_masked_row_is_zero():
    q, k, v = (torch.randn(1, 1, 3, 8, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    keep = torch.ones(3, 3, dtype=torch.bool)
    keep[1] = False
    out = reference.attention(q, k, v, attn_mask=keep)
    assert (out[0, 0, 1] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_attention_packed_is_multihead_attention():
    mha = nn.MultiheadAttention(24, 2, bias=True, batch_first=True).double()
    x = torch.randn(2, 5, 24, dtype=DOUBLE)
    qkv = F.linear(x, mha.in_proj_weight, mha.in_proj_bias)
    ours = mha.out_proj(reference.attention_packed(qkv, 2))
    torch.testing.assert_close(ours, mha(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("act", "module"),
    [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("quick_gelu", lambda h: h * torch.sigmoid(1.702 * h))],
)
def test_layernorm_mlp_is_the_block_of_modules(act, module):
    inputs = make_inputs("layernorm_mlp", TINY, 2, DOUBLE)
    row_scale = torch.tensor([0.0, 1.25], dtype=DOUBLE)
    norm = F.layer_norm(inputs["x"], (24,), inputs["norm_weight"], inputs["norm_bias"], 1e-6)
    hidden = module(F.linear(norm, inputs["fc1_weight"], inputs["fc1_bias"]))
    branch = F.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"]) * inputs["layer_scale"]
    ours = reference.layernorm_mlp(**inputs, act=act, row_scale=row_scale)
    torch.testing.assert_close(ours, inputs["x"] + branch * row_scale.view(2, 1, 1))
    without = reference.layernorm_mlp(**inputs, act=act, residual=False)
    torch.testing.assert_close(without, branch)


@pytest.mark.parametrize("op", ["patch_embed", "attention", "layernorm_linear", "linear_residual", "layernorm_mlp"])
def test_gradients_in_float64(op):
    inputs = make_inputs(op, Shape(8, 2, 12, 3, patch_size=2, image_size=4), 2, DOUBLE)
    names = list(inputs)
    fn = getattr(reference, op)
    assert torch.autograd.gradcheck(lambda *values: fn(**dict(zip(names, values, strict=True))), tuple(inputs.values()))


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="'relu', expected one of 'gelu', 'gelu_tanh', 'quick_gelu'"):
        reference.activation(torch.zeros(1), "relu")
