"""fastvit.attention_maps against the weights that an unfused attention computes in plain sight."""

import pytest
import torch
from tiny_vits import build, native
from torch import nn

import fastvit
from fastvit.dispatch import recording
from fastvit.testing import assert_as_accurate


def images(dtype=torch.float32):
    return torch.randn(3, 3, 32, 32, dtype=dtype)


def unfused(model, pixels):
    """Every layer's weights, caught at the input of attn_drop with the fused attention turned off."""
    caught = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        model(pixels)
    return caught


MODELS = {
    "native": lambda: native(),
    "native, qk norm": lambda: native(qk_norm=True),
    "timm": lambda: build(),
    "timm, accelerated": lambda: fastvit.accelerate(build()),
    "timm, registers, no bias": lambda: fastvit.accelerate(build(reg_tokens=2, qkv_bias=False)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_unfused_softmax(name, dtype):
    model, twin, exact = (MODELS[name]() for _ in range(3))
    pixels = images()
    maps = fastvit.attention_maps(model.to(dtype), pixels.to(dtype), layers=None, rows="all")
    stock = unfused(fastvit.restore(twin).to(dtype), pixels.to(dtype))
    expected = unfused(fastvit.restore(exact).double(), pixels.double())
    assert list(maps) == [0, 1]
    for layer, weights in maps.items():
        if dtype == torch.float64:
            torch.testing.assert_close(weights, expected[layer])
        else:
            assert_as_accurate(weights.to(dtype), stock[layer], expected[layer], f"layer {layer}")
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.parametrize("model", [native(), native(global_pool="avg")], ids=["token", "avg"])
def test_rows_and_layers(model):
    pixels = images()
    every = fastvit.attention_maps(model, pixels, layers=(0, 1), rows="all")
    tokens = every[0].shape[-1]
    assert every[0].shape == (3, 2, tokens, tokens)
    torch.testing.assert_close(fastvit.attention_maps(model, pixels)[1], every[1][:, :, :1])
    torch.testing.assert_close(fastvit.attention_maps(model, pixels, 0, 3)[0], every[0][:, :, 3:4])
    some = fastvit.attention_maps(model, pixels, layers=(-2,), rows=(5, -1))
    assert list(some) == [0]
    torch.testing.assert_close(some[0], every[0][:, :, [5, tokens - 1]])


def test_the_result_owns_no_more_memory_than_it_shows():
    for weights in fastvit.attention_maps(native(), images()).values():
        assert weights.untyped_storage().nbytes() == weights.numel() * weights.itemsize
        assert not weights.requires_grad


def test_the_fast_path_stays_on_and_nothing_is_left_behind():
    model, pixels = fastvit.accelerate(build()), images()
    with torch.no_grad(), recording() as before:
        logits = model(pixels)
    with recording() as during:
        fastvit.attention_maps(model, pixels, layers=(0,))
    assert during == before
    assert not any(block._forward_pre_hooks for block in model.blocks)
    with torch.no_grad():
        assert torch.equal(model(pixels), logits)


def test_a_projection_of_another_kind_is_asked_itself():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, pixels = native(), images()
    linear = model.blocks[1].attn.qkv
    twin = native()
    twin.blocks[1].attn.qkv.weight.data.mul_(2)
    twin.blocks[1].attn.qkv.bias.data.mul_(2)
    doubled = Doubled(linear.in_features, linear.out_features)
    doubled.load_state_dict(linear.state_dict())
    model.blocks[1].attn.qkv = doubled
    torch.testing.assert_close(fastvit.attention_maps(model, pixels)[1], fastvit.attention_maps(twin, pixels)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers names 2, expected a number below 2, of its blocks"),
        ({"rows": 99}, "rows names 99, expected a number below 17, of its tokens"),
        ({"rows": "class"}, "rows is 'class', expected 'cls', 'all' or numbers of tokens"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastvit.attention_maps(native(), images(), **options)


def test_bad_models_are_named():
    with pytest.raises(TypeError, match="model is a Linear without a sequence of blocks, expected a ViT"):
        fastvit.attention_maps(nn.Linear(3, 3), images())
    with pytest.raises(ValueError, match="the model has no cls_token; name the rows by number"):
        fastvit.attention_maps(native(class_token=False, global_pool="avg"), images())
    model = native()
    model.blocks[0].attn = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.0.attn is a Identity, expected timm's or fastvit's Attention"):
        fastvit.attention_maps(model, images(), layers=0)
