"""The model against timm's: keys, outputs, gradients, methods and initial weights; and what only this model has."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import fastvit
from fastvit import layers
from fastvit.model import VisionTransformer, create_model
from fastvit.parity import STOCK_RUNS, worst_of
from fastvit.relabel import embed_axes, orders, relabel, relabelled
from fastvit.testing import errors, judge
from fastvit.variants import ROWS

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
CONFIGS = {
    "vit": {},
    "deit3": {"no_embed_class": True, "init_values": 0.3},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3},
    "registers_in_table": {"reg_tokens": 2},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": "layernorm"},
    "gap": {"global_pool": "avg", "class_token": False, "fc_norm": False, "qkv_bias": False},
    "avg": {"global_pool": "avg", "reg_tokens": 1},
    "avgmax_all": {"global_pool": "avgmax", "pool_include_prefix": True},
    "max": {"global_pool": "max", "final_norm": False},
    "map": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
    "map_prefix": {"global_pool": "map", "reg_tokens": 1, "pool_include_prefix": True},
    "prr": {"global_pool": "prr"},
    "tokens": {"global_pool": "", "num_classes": 0},
    "no_positions": {"pos_embed": "none"},
    "beit3": {"scale_attn_norm": True, "scale_mlp_norm": True, "global_pool": "avg"},
    "qk_norm": {"qk_norm": True, "norm_layer": "rmsnorm"},
    "embed_norm": {"embed_norm_layer": "layernorm", "proj_bias": False},
    "dynamic": {"dynamic_img_size": True, "reg_tokens": 1},
    "dynamic_no_embed": {"dynamic_img_size": True, "no_embed_class": True},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "grey": {"in_chans": 1, "img_size": (16, 24), "patch_size": (4, 8)},
    "cropped": {"img_size": 18},
}
SWIGLU = {"mlp_ratio": 3.0, "act_layer": nn.SiLU}


def randomise(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() == 1 or parameter.shape[0] == 1 else parameter[0].numel() ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
    return module


def pair(timm, dtype=torch.float64, **options):
    """The same model from timm and from here, with the same values."""
    theirs = randomise(timm.models.VisionTransformer(**{**SMALL, **options})).to(dtype).eval()
    ours = VisionTransformer(**{**SMALL, **options}).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images_for(model, batch=3, dtype=torch.float64, size=None):
    height, width = size or model.patch_embed.img_size
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, model.in_chans, height, width, generator=generator, dtype=torch.float64).to(dtype)


def outcome(model, images, call=None):
    """Output and every gradient, by name; gradients that stay None are left out."""
    images = images.clone().requires_grad_()
    out = model(images) if call is None else call(images)
    parameters = dict(model.named_parameters())
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [images, *parameters.values()], target, allow_unused=True)
    named = dict(zip(["images", *parameters], grads, strict=True))
    return {"output": out.detach()} | {name: grad for name, grad in named.items() if grad is not None}


def stock_errors(model, images, exact):
    """The largest errors of stock in several orders of its embedding channels, as in the certificate."""
    axes, runs = embed_axes(model), []
    for order in orders(model, axes, STOCK_RUNS):
        run = outcome(relabelled(model, axes, order), images)
        runs.append({key: errors(relabel(run[key], axes.get(key), order.argsort()), exact[key]) for key in exact})
    return worst_of(runs)


def assert_equal(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = theirs[name].abs().max().clamp_min(1e-3)
        assert ((value - theirs[name]).abs().max() / scale).item() <= tolerance, name


def test_constructor_takes_timms_arguments(timm):
    theirs = inspect.signature(timm.models.VisionTransformer.__init__).parameters
    ours = inspect.signature(VisionTransformer.__init__).parameters
    extra = [p for p in ours.values() if p.kind is p.KEYWORD_ONLY]
    assert list(theirs) == list(ours)[: len(theirs)]
    assert [p.name for p in extra] == ["pixel_mean", "pixel_std", "cls_only_last_block"]
    for name, parameter in theirs.items():
        default = getattr(parameter.default, "__name__", parameter.default)
        assert getattr(ours[name].default, "__name__", ours[name].default) == default, name
    for method in (
        "forward", "forward_features", "forward_head", "forward_intermediates", "get_intermediate_layers",
        "prune_intermediate_layers", "set_input_size", "reset_classifier", "get_classifier", "init_weights",
        "set_grad_checkpointing", "group_matcher", "no_weight_decay", "load_pretrained", "pool", "fix_init_weight",
    ):  # fmt: skip
        expected = list(inspect.signature(getattr(timm.models.VisionTransformer, method)).parameters)
        assert list(inspect.signature(getattr(VisionTransformer, method)).parameters) == expected, method


def test_every_variant_has_timms_keys_and_shapes(timm):
    with torch.device("meta"):
        for name in [name.format(sides[0]) for name, _, _, sides, *_ in ROWS]:
            theirs, ours = timm.create_model(name, depth=1), create_model(name, depth=1)
            shapes = [[(k, v.shape) for k, v in model.state_dict().items()] for model in (ours, theirs)]
            assert shapes[0] == shapes[1], name
            for attribute in ("num_classes", "num_features", "num_prefix_tokens", "global_pool", "no_embed_class"):
                assert getattr(ours, attribute) == getattr(theirs, attribute), (name, attribute)
            for entry in ("num_classes", "input_size", "mean", "std", "first_conv", "classifier"):
                assert tuple_of(ours.pretrained_cfg[entry]) == tuple_of(theirs.pretrained_cfg[entry]), (name, entry)


def tuple_of(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value


def test_vit_base_has_152_tensors():
    with torch.device("meta"):
        state = create_model("vit_base_patch16_224").state_dict()
    assert len(state) == 152
    assert sum(value.numel() for value in state.values()) == 86_567_656


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_outputs_and_gradients_match_timm(timm, options):
    ours, theirs = pair(timm, **options)
    images = images_for(ours)
    with fastvit.use_backend("reference"):
        result = outcome(ours, images)
        assert_equal(result, outcome(theirs, images))
        if ours.dynamic_img_size:
            size = (11, 21) if ours.patch_embed.dynamic_img_pad else (12, 20)
            images = images_for(ours, size=size)
            assert_equal(outcome(ours, images), outcome(theirs, images), 1e-6)  # the table is resized in float32


@pytest.mark.parametrize("mlp", ["SwiGLUPacked", "SwiGLU"])
def test_gated_mlp_matches_timm(timm, mlp):
    theirs = randomise(timm.models.VisionTransformer(**SMALL, **SWIGLU, mlp_layer=getattr(timm.layers, mlp))).double()
    ours = VisionTransformer(**SMALL, **SWIGLU, mlp_layer=getattr(layers, mlp)).double()
    ours.load_state_dict(theirs.state_dict())
    images = images_for(ours)
    assert_equal(outcome(ours, images), outcome(theirs, images))


def test_timms_own_layers_can_be_passed_in(timm):
    vit = timm.models.vision_transformer
    options = {"block_fn": vit.Block, "embed_layer": timm.layers.PatchEmbed, "norm_layer": timm.layers.LayerNorm}
    options |= {"mlp_layer": timm.layers.Mlp, "attn_layer": timm.layers.Attention}
    ours, theirs = pair(timm, **options)
    images = images_for(ours)
    assert_equal(outcome(ours, images), outcome(theirs, images))


@pytest.mark.parametrize("mask", ["bool", "causal"])
def test_masks_match_timm(timm, mask):
    ours, theirs = pair(timm)
    keep = torch.rand(17, 17, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[:, 0] = True
    arguments = {"attn_mask": keep} if mask == "bool" else {"is_causal": True}
    images = images_for(ours)
    expected = outcome(theirs, images, lambda x: theirs(x, **arguments))
    assert_equal(outcome(ours, images, lambda x: ours(x, **arguments)), expected)
    assert (expected["output"] - theirs(images)).abs().max() > 1e-6


@pytest.mark.parametrize(
    "rates",
    [
        {"drop_path_rate": 0.5},
        {"drop_rate": 0.2, "pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2},
        {"patch_drop_rate": 0.5, "reg_tokens": 1},
    ],
)
def test_training_draws_timms_random_numbers(timm, rates):
    ours, theirs = pair(timm, **rates)
    ours.cls_only_last_block = False
    images, results = images_for(ours), []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(7)
        with fastvit.use_backend("torch"):
            results.append(outcome(model, images))
    assert_equal(*results)


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "reset", "skip"])
@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2, "init_values": 0.1, "fix_init": True}, {"global_pool": "map"}]
)
def test_same_seed_gives_timms_initial_weights(timm, mode, options):
    models = []
    for cls in (timm.models.VisionTransformer, VisionTransformer):
        torch.manual_seed(3)
        with torch.device("cpu"):
            models.append(cls(**SMALL, **options, weight_init=mode))
    theirs, ours = (model.state_dict() for model in models)
    for key, value in theirs.items():
        if mode == "skip" and value.dim() == 3:
            continue  # left uninitialised by both
        assert torch.equal(ours[key], value), key
    if mode != "skip":
        for model in models:
            torch.manual_seed(4)
            model.init_weights()
        for key, value in models[0].state_dict().items():
            assert torch.equal(models[1].state_dict()[key], value), key


@pytest.mark.parametrize("name", ["vit", "registers", "gap", "dynamic"])
def test_features_and_intermediates_match_timm(timm, name):
    ours, theirs = pair(timm, **{**CONFIGS[name], "depth": 3})
    images = images_for(ours)
    with fastvit.use_backend("reference"), torch.no_grad():
        features = theirs.forward_features(images)
        assert (ours.forward_features(images) - features).abs().max() < 1e-10
        for pre_logits in (False, True):
            same(ours.forward_head(features, pre_logits), theirs.forward_head(features, pre_logits))
        for arguments in (
            {},
            {"indices": 2, "norm": True, "return_prefix_tokens": True},
            {"indices": [0, -1], "output_fmt": "NLC", "intermediates_only": True},
            {"indices": [1], "stop_early": True, "output_dict": True, "return_prefix_tokens": True},
            {"indices": (0,), "output_dict": True, "intermediates_only": True, "is_causal": True},
        ):
            same(ours.forward_intermediates(images, **arguments), theirs.forward_intermediates(images, **arguments))
        for arguments in ({}, {"n": 2, "reshape": True, "norm": True}, {"n": [0, 2], "return_prefix_tokens": True}):
            same(ours.get_intermediate_layers(images, **arguments), theirs.get_intermediate_layers(images, **arguments))
        assert ours.feature_info == theirs.feature_info
        assert [model.prune_intermediate_layers([1], prune_norm=True) for model in (ours, theirs)] == [[1], [1]]
        assert len(ours.blocks) == 2
        same(ours(images), theirs(images))
        assert list(ours.state_dict()) == list(theirs.state_dict())


def same(ours, theirs):
    """Equal tensors in the same containers."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-10
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        same(list(ours.values()), list(theirs.values()))
    else:
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)


@pytest.mark.parametrize("name", ["vit", "registers", "dynamic_no_embed", "registers_in_table"])
def test_new_input_sizes_match_timm(timm, name):
    ours, theirs = pair(timm, **CONFIGS[name])
    for arguments in ({"img_size": (24, 12)}, {"patch_size": 2}, {"img_size": 32, "patch_size": (8, 4)}):
        ours.set_input_size(**arguments)
        theirs.set_input_size(**arguments)
        images = images_for(ours)
        assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size
        assert (ours(images) - theirs(images)).abs().max() < 1e-5
    assert ours.pos_embed.requires_grad


def test_classifier_and_bookkeeping_match_timm(timm):
    ours, theirs = pair(timm, global_pool="avg")
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.get_classifier() is ours.head
    for arguments in ((7,), (0,), (3, "token"), (4, "max"), (0, "")):
        for model in (ours, theirs):
            model.reset_classifier(*arguments)
        ours.load_state_dict(theirs.state_dict())
        assert (ours.num_classes, ours.global_pool) == (theirs.num_classes, theirs.global_pool)
        assert ours.head.training is False
        same(ours(images_for(ours)), theirs(images_for(ours)))
    ours, theirs = pair(timm, global_pool="map", class_token=False)
    for model in (ours, theirs):
        model.reset_classifier(3, "avg")
    ours.load_state_dict(theirs.state_dict())
    same(ours(images_for(ours)), theirs(images_for(ours)))
    with pytest.raises(ValueError, match="cannot add an attention pool"):
        ours.reset_classifier(3, "map")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "registers", "clip", "map", "gap"])
def test_default_backend_is_as_accurate_as_timm(timm, dtype, name):
    ours, theirs = pair(timm, dtype=dtype, **CONFIGS[name])
    exact, images = copy.deepcopy(theirs).double(), images_for(ours, dtype=dtype)
    mine, true = outcome(ours, images), outcome(exact, images.double())
    assert mine.keys() == true.keys()
    stock = stock_errors(theirs, images, true)
    for key, value in mine.items():
        if true[key].abs().max() > 1e-12:
            result = judge(errors(value, true[key]), stock[key], true[key], dtype)
            assert result.passed, f"{key}: {result}"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["vit", "registers", "deit3", "qk_norm"])
def test_class_token_alone_gives_the_same_logits_and_gradients(name, training):
    model = randomise(VisionTransformer(**{**SMALL, **CONFIGS[name]}, drop_path_rate=0.3)).double().train(training)
    images, results = images_for(model), []
    for only in (True, False):
        model.cls_only_last_block = only
        torch.manual_seed(1)
        with fastvit.use_backend("reference"):
            results.append(outcome(model, images))
    assert_equal(*results)


def test_class_token_alone_gives_way_to_hooks_and_subclasses():
    model, images = VisionTransformer(**SMALL).eval(), torch.randn(2, 3, 16, 16)
    assert model._only_class_token_is_read()
    for name in ("blocks", "blocks.1", "blocks.1.mlp.fc1", "norm"):
        shapes = []
        hook = partial(lambda seen, module, args, out: seen.append(out.shape), shapes)
        handle = model.get_submodule(name).register_forward_hook(hook)
        model(images)
        handle.remove()
        assert [shape[1] for shape in shapes] == [17], name

    class Different(VisionTransformer):
        def pool(self, x, pool_type=None):
            return x.mean(1)

    different = Different(**SMALL).eval()
    assert not different._only_class_token_is_read()
    different.load_state_dict(model.state_dict())
    assert torch.allclose(different(images), different.head(different.forward_features(images).mean(1)))
    assert not VisionTransformer(**SMALL, global_pool="avg")._only_class_token_is_read()
    assert not VisionTransformer(**SMALL, cls_only_last_block=False)._only_class_token_is_read()


@pytest.mark.parametrize("name", ["vit", "padded", "cropped"])
def test_raw_pixels_are_normalised(name):
    statistics = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
    model = VisionTransformer(**{**SMALL, **CONFIGS[name]}, **statistics).double().eval()
    assert not any("pixel" in key for key in model.state_dict())
    assert model.pixel_mean.dtype == torch.float32
    size = (14, 18) if name == "padded" else model.patch_embed.img_size
    raw = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in statistics.values())
    with fastvit.use_backend("reference"):
        assert (model(raw) - model((raw.double() / 255 - mean) / std)).abs().max() < 1e-6
    half = copy.deepcopy(model).bfloat16()
    assert torch.equal(half.pixel_std, model.pixel_std), "rounding the statistics would change the image"
    assert half(raw).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="images are uint8"):
        VisionTransformer(**SMALL)(raw[..., :16, :16])
    with pytest.raises(ValueError, match="belong together"):
        VisionTransformer(**SMALL, pixel_mean=(0.5,) * 3)
    with pytest.raises(ValueError, match="pixel_mean has 1 values"):
        VisionTransformer(**SMALL, pixel_mean=(0.5,), pixel_std=(0.5,))


@pytest.mark.parametrize("name", ["vit", "gap"])
def test_gradient_checkpointing_changes_nothing(name):
    model = randomise(VisionTransformer(**{**SMALL, **CONFIGS[name]}, drop_path_rate=0.3)).double().train()
    images, results = images_for(model), []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        results.append(outcome(model, images))
    assert_equal(*results, tolerance=1e-14)


def test_copies_and_pickles_give_the_same():
    model, images = create_model("test_vit", depth=2).eval(), torch.randn(2, 3, 160, 160)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        assert torch.equal(other.pixel_mean, model.pixel_mean)
        assert other.patch_embed.proj.weight.data_ptr() != model.patch_embed.proj.weight.data_ptr()


@pytest.mark.parametrize("name", ["vit", "registers", "map"])
def test_empty_batch(name):
    model = VisionTransformer(**{**SMALL, **CONFIGS[name]})
    out = model(torch.zeros(0, 3, 16, 16))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert model.head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("name", ["vit", "registers", "map"])
def test_compiles_in_one_graph_with_its_backward(name):
    torch._dynamo.reset()
    model = randomise(VisionTransformer(**{**SMALL, **CONFIGS[name]})).train()
    images = images_for(model, dtype=torch.float32)
    expected = outcome(model, images)
    result = outcome(model, images, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert_equal(result, expected, 1e-5)


def test_autocast_gives_timms_dtypes(timm):
    ours, theirs = pair(timm, dtype=torch.float32, init_values=0.3)
    exact, images = copy.deepcopy(theirs).double(), images_for(ours, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, stock = outcome(ours, images), outcome(theirs, images)
        assert ours.forward_features(images).dtype == theirs.forward_features(images).dtype
    true = outcome(exact, images.double())
    with torch.autocast("cpu", torch.bfloat16):
        stock_error = stock_errors(theirs, images, true)
    for key, value in mine.items():
        assert value.dtype == stock[key].dtype, key
        result = judge(errors(value, true[key]), stock_error[key], true[key], torch.bfloat16)
        assert result.passed, f"{key}: {result}"


@pytest.mark.parametrize("name", ["vit", "dynamic", "map"])
def test_symbolic_trace_gives_the_same(name):
    model = VisionTransformer(**{**SMALL, **CONFIGS[name]}).eval()
    traced = torch.fx.symbolic_trace(model, {"attn_mask": None, "is_causal": False})
    for size in ((16, 16), (20, 12))[: 2 if name == "dynamic" else 1]:
        images = torch.randn(2, 3, *size)
        assert torch.allclose(traced(images), model(images), atol=1e-6)


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_timm_extracts_attention_weights(timm, method):
    ours, theirs = pair(timm, dtype=torch.float32)
    for block in (*ours.blocks, *theirs.blocks):
        block.attn.fused_attn = False
    images = images_for(ours, dtype=torch.float32)
    maps, expected = (timm.utils.AttentionExtract(model, method=method)(images) for model in (ours, theirs))
    assert list(maps) == list(expected)
    for name, weights in maps.items():
        assert torch.allclose(weights, expected[name], atol=1e-6)


def test_pixel_statistics_survive_the_meta_device():
    with torch.device("meta"):
        model = create_model("test_vit", depth=1)
    assert model.to_empty(device="cpu").pixel_mean.tolist() == [0.5, 0.5, 0.5]


def test_create_model():
    model = create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=10, depth=1, drop_path_rate=0.1)
    assert model.head.out_features == 10
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert create_model("test_vit", depth=1, in_chans=1).pixel_mean is None
    with pytest.raises(ValueError, match=r"checkpoint_path='vit_base_patch16_224\.safetensors'"):
        create_model("vit_base_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match="did you mean vit_base_patch16_224"):
        create_model("vit_base_patch16_223")
    with pytest.raises(ValueError, match="no variant is called 'resnet50'"):
        create_model("resnet50")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_pool": "mean"}, "global_pool is 'mean'"),
        ({"class_token": False}, "global_pool is 'token'"),
        ({"pos_embed": "sincos"}, "pos_embed is 'sincos'"),
        ({"weight_init": "xavier"}, "weight_init is 'xavier'"),
        ({"norm_layer": "batchnorm2d"}, "norm_layer is 'batchnorm2d'"),
        ({"embed_norm_layer": "groupnorm"}, "embed_norm_layer is 'groupnorm'"),
        ({"act_layer": "softplus"}, "act_layer is 'softplus'"),
        ({"attn_layer": "diff"}, "attn_layer is 'diff'"),
        ({"num_heads": 3}, "multiple of num_heads"),
    ],
)
def test_arguments_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformer(**{**SMALL, **options})


def test_calls_are_refused_with_reasons():
    model = VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match="images are 20 x 16 pixels, expected 16 x 16"):
        model(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="expected multiples of 4 x 4"):
        VisionTransformer(**SMALL, dynamic_img_size=True)(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match="indices is 3, expected 1 to 2"):
        model.forward_intermediates(torch.zeros(1, 3, 16, 16), 3)
    with pytest.raises(ValueError, match=r"indices is \[2\]"):
        model.prune_intermediate_layers([2])
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(torch.zeros(1, 3, 16, 16), output_fmt="NHWC")
    with pytest.raises(ValueError, match="pool_type is 'mean'"):
        model.pool(torch.zeros(1, 17, 32), "mean")
    with pytest.raises(ValueError, match="mode is 'kaiming'"):
        model.init_weights("kaiming")
