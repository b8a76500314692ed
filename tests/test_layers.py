"""Modules and block execution: the same results as timm's modules, whatever is switched on, hooked or replaced."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastvit
from fastvit import fused, layers, norm_act, pool
from fastvit.resample import resample_patch_weight, resample_pos_embed
from fastvit.testing import assert_as_accurate

DIM, HEADS, TOKENS, BATCH = 48, 3, 7, 4
OPTIONS = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "no_bias": {"proj_bias": False},
    "layer_scale": {"qkv_bias": True, "init_values": 0.3},
    "qk_norm": {"qk_norm": True},
    "attn_norm": {"scale_attn_norm": True, "qkv_bias": True},
    "mlp_norm": {"scale_mlp_norm": True, "init_values": 0.3},
    "ragged_hidden": {"mlp_ratio": 2.7},
}


def randomise(module):
    """Values that are different everywhere, so that nothing can be left out or mixed up unseen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
    return module


def tokens(dtype=torch.float64, batch=BATCH, grad=True):
    x = torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def outcome(fn, module, x):
    """Output and every gradient of ``fn(x)``, by name."""
    out = fn(x)
    parameters = dict(module.named_parameters())
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [x, *parameters.values()], target, allow_unused=True)
    named = dict(zip(["x", *parameters], grads, strict=True))
    assert all(grad is not None for grad in named.values()), [name for name, grad in named.items() if grad is None]
    return {"output": out.detach(), **named}


def assert_equal(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = theirs[name].abs().max().clamp_min(1e-3)  # a key bias has no gradient but rounding noise
        assert ((value - theirs[name]).abs().max() / scale).item() <= tolerance, name


def timm_block(timm, **options):
    vit = timm.models.vision_transformer
    return randomise(vit.Block(DIM, HEADS, **options)).double()


def our_block(**options):
    return randomise(layers.Block(DIM, HEADS, **options)).double()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_block_matches_timm(timm, options):
    theirs, ours = timm_block(timm, **options).eval(), our_block(**options).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    expected = outcome(theirs, theirs, x)
    with fastvit.use_backend("reference"):
        assert_equal(outcome(ours, ours, x), expected)
        assert_equal(outcome(lambda x: fused.block_forward(theirs, x), theirs, x), expected)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "hard_swish"])
def test_activations_match_timm(timm, act):
    theirs = timm_block(timm, act_layer=timm.layers.get_act_layer(act)).eval()
    ours = our_block(act_layer=norm_act.get_act_layer(act)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, expected = tokens(), outcome(theirs, theirs, tokens())
    assert bool(fused.why_not_fused(ours)) == (act in ("silu", "relu", "hard_swish"))
    assert bool(fused.why_not_fused(theirs)) == (act in ("silu", "relu", "hard_swish"))
    with fastvit.use_backend("reference"):
        assert_equal(outcome(ours, ours, x), expected)
        assert_equal(outcome(lambda x: fused.block_forward(theirs, x), theirs, x), expected)


@pytest.mark.parametrize("mlp", ["SwiGLUPacked", "SwiGLU", "GluMlp"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "layernormfp32"])
def test_gated_mlps_and_norms_match_timm(timm, mlp, norm):
    act = nn.SiLU if "Swi" in mlp else nn.Sigmoid
    theirs = timm_block(
        timm, mlp_layer=getattr(timm.layers, mlp), act_layer=act, norm_layer=timm.layers.get_norm_layer(norm)
    ).eval()
    ours = our_block(mlp_layer=getattr(layers, mlp), act_layer=act, norm_layer=norm_act.get_norm_layer(norm)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, expected = tokens(), outcome(theirs, theirs, tokens())
    tolerance = 1e-5 if norm == "layernormfp32" else 1e-10
    with fastvit.use_backend("reference"):
        assert_equal(outcome(ours, ours, x), expected, tolerance)
        assert_equal(outcome(lambda x: fused.block_forward(theirs, x), theirs, x), expected, tolerance)


@pytest.mark.parametrize("mask", ["bool", "float", "causal"])
@pytest.mark.parametrize("fused_attn", [True, False])
def test_masks_match_timm(timm, mask, fused_attn):
    theirs = timm_block(timm, qkv_bias=True, qk_norm=True).eval()
    ours = our_block(qkv_bias=True, qk_norm=True).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.attn.fused_attn = fused_attn
    generator = torch.Generator().manual_seed(9)
    shape = (BATCH, 1, TOKENS, TOKENS)
    masks = {
        "bool": {"attn_mask": torch.rand(shape, generator=generator) > 0.3},
        "float": {"attn_mask": torch.randn(shape, generator=generator).double()},
        "causal": {"is_causal": True},
    }[mask]
    if mask == "bool":
        masks["attn_mask"][..., 0] = True
    x = tokens()
    expected = outcome(lambda x: theirs(x, **masks), theirs, x)
    with fastvit.use_backend("reference"):
        assert_equal(outcome(lambda x: ours(x, **masks), ours, x), expected)
        assert_equal(outcome(lambda x: fused.block_forward(theirs, x, **masks), theirs, x), expected)


@pytest.mark.parametrize(
    "rates",
    [
        {"drop_path": 0.4},
        {"proj_drop": 0.3},
        {"attn_drop": 0.3},
        {"drop_path": 0.3, "proj_drop": 0.2, "attn_drop": 0.1},
    ],
    ids=lambda rates: "+".join(rates),
)
def test_training_draws_timms_random_numbers(timm, rates):
    theirs, ours = timm_block(timm, qkv_bias=True, **rates).train(), our_block(qkv_bias=True, **rates).train()
    ours.load_state_dict(theirs.state_dict())
    x, results = tokens(), []
    for fn, module in ((theirs, theirs), (ours, ours), (lambda x: fused.block_forward(theirs, x), theirs)):
        torch.manual_seed(11)
        with fastvit.use_backend("torch"):
            results.append(outcome(fn, module, x))
    assert not torch.equal(results[0]["output"], theirs.eval()(x))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_keeps_whole_samples(scale_by_keep):
    drop_path = layers.DropPath(0.25, scale_by_keep).train()
    x = torch.ones(4000, 2, 3)
    gamma, row_scale = fused.branch_scales(None, drop_path, x)
    kept = 1 / 0.75 if scale_by_keep else 1.0
    assert gamma is None
    assert set(row_scale.tolist()) == {0.0, torch.tensor(kept).item()}
    assert abs((row_scale > 0).float().mean().item() - 0.75) < 0.03
    out = drop_path(x)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(kept).item()}
    assert fused.branch_scales(None, drop_path.eval(), x) == (None, None)
    assert fused.branch_scales(None, layers.DropPath(1.0).train(), x)[1].sum() == 0


LEAVES = (
    "norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj",
    "attn.proj_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2",
    "mlp.drop2", "ls2", "drop_path2",
)  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
def test_hooked_module_is_called_and_named(timm, name):
    block = timm_block(timm, qkv_bias=True, init_values=0.3, drop_path=0.1).eval()
    x = tokens()
    expected = outcome(block, block, x)
    seen = []
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    reasons = fused.why_not_fused(block)
    assert any(name in reason for reason in reasons), reasons
    with fastvit.use_backend("reference"):
        assert_equal(outcome(lambda x: fused.block_forward(block, x), block, x), expected)
        assert len(seen) == 1
        fused.class_token_block_forward(block, x)
        assert len(seen) == 2
        assert seen[0] == seen[1], "the hook must see all tokens"
    handle.remove()
    assert fused.why_not_fused(block) == []


def test_hooks_for_all_modules_are_called(timm):
    block, names = timm_block(timm).eval(), []
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: names.append(type(module).__name__)):
        fused.block_forward(block, tokens())
    assert names.count("Linear") == 4
    assert names.count("Mlp") == 1


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("change", ["adapter", "parametrised", "replaced"])
def test_changed_linear_layer_counts(timm, name, change):
    block = timm_block(timm, qkv_bias=True).eval()
    parent, child = block.get_submodule(name.split(".")[0]), name.split(".")[1]
    linear = getattr(parent, child)
    if change == "adapter":
        setattr(parent, child, Adapted(linear))
    elif change == "parametrised":
        parametrize.register_parametrization(linear, "weight", nn.Tanh())
    else:
        original = linear.forward
        linear.forward = lambda x: original(x).relu()
    (reason,) = fused.why_not_fused(block)
    assert name in reason
    x = tokens()
    expected = outcome(block, block, x)
    with fastvit.use_backend("reference"):
        assert_equal(outcome(lambda x: fused.block_forward(block, x), block, x), expected)
        class_token = outcome(lambda x: fused.class_token_block_forward(block, x), block, x)["output"]
        assert (class_token - expected["output"][:, :1]).abs().max() < 1e-12


def test_reasons_name_module_and_rule(timm):
    block = timm_block(timm, qk_norm=True, scale_attn_norm=True, proj_drop=0.1).train()
    block.attn.k_norm = nn.Softmax(dim=-1)
    reasons = "; ".join(fused.why_not_fused(block))
    for words in (
        "attn.k_norm is a Softmax",
        "attn.norm is a LayerNorm",
        "attn.proj_drop is active (p=0.1)",
        "mlp.drop1",
    ):
        assert words in reasons
    assert "Sequential" in fused.why_not_fused(nn.Sequential())[0]
    block.attn.fused_attn = False
    assert "fused_attn" in "; ".join(fused.why_not_fused(block))
    assert fused.why_not_fused(our_block(init_values=0.1, drop_path=0.1).train()) == []


def test_attention_weights_are_seen_when_not_fused(timm):
    block = our_block(qkv_bias=True).eval()
    x, weights = tokens(), []
    expected = block(x)
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    assert (block(x) - expected).abs().max() < 1e-12
    assert weights[0].shape == (BATCH, HEADS, TOKENS, TOKENS)
    assert (weights[0].sum(-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"mlp_layer": layers.SwiGLU}], ids=[*OPTIONS, "swiglu"])
def test_class_token_alone_is_the_same(options):
    block, x = our_block(**options).eval(), tokens()
    with fastvit.use_backend("reference"):
        expected = outcome(lambda x: block(x)[:, :1], block, x)
        assert_equal(outcome(lambda x: fused.class_token_block_forward(block, x), block, x), expected)


class MixesTokens(nn.Module):
    """Something between the tokens that only its author knows of."""

    def forward(self, x):
        return x - x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["norm2", "mlp", "mlp.act", "attn.proj_drop", "ls2"])
def test_class_token_alone_leaves_unknown_modules_all_tokens(timm, name):
    for block in (our_block(init_values=0.3).eval(), timm_block(timm, init_values=0.3).eval()):
        parent = block.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], MixesTokens())
        x = tokens(grad=False)
        assert torch.equal(fused.class_token_block_forward(block, x), block(x)[:, :1])


def test_class_token_alone_draws_the_same_samples():
    block, x = our_block(qkv_bias=True, drop_path=0.5).train(), tokens(batch=16)
    torch.manual_seed(2)
    expected = outcome(lambda x: block(x)[:, :1], block, x)
    torch.manual_seed(2)
    assert_equal(outcome(lambda x: fused.class_token_block_forward(block, x), block, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [fused.block_forward, fused.class_token_block_forward])
def test_default_backend_is_as_accurate_as_timm(timm, dtype, run):
    exact_block = timm_block(timm, qkv_bias=True, init_values=0.3).to(dtype).double().eval()
    block = copy.deepcopy(exact_block).to(dtype)
    x = tokens(dtype)
    ours = outcome(lambda x: run(block, x), block, x)
    count = ours["output"].shape[1]
    stock = outcome(lambda x: block(x)[:, :count], block, x)
    exact = outcome(lambda x: exact_block(x)[:, :count], exact_block, x.detach().double().requires_grad_())
    for name, value in ours.items():
        assert_as_accurate(value, stock[name], exact[name], name)


def test_autocast_keeps_the_residual_stream(timm):
    exact_block = timm_block(timm, qkv_bias=True, init_values=0.3).eval()
    block = copy.deepcopy(exact_block).float()
    x = tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(lambda x: fused.block_forward(block, x), block, x)
        stock = outcome(block, block, x)
    exact = outcome(exact_block, exact_block, x.detach().double().requires_grad_())
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype == torch.float32
        # both round to bfloat16 inside, so that is the unit in which their errors are judged
        assert_as_accurate(value.bfloat16(), stock[name].bfloat16(), exact[name], name)


def test_symbolic_trace_records_the_ops():
    block, x = our_block(qkv_bias=True, init_values=0.3).eval(), tokens()
    traced = torch.fx.symbolic_trace(block, {"attn_mask": None, "is_causal": False})
    names = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert [name for name in names if name in dir(fastvit.ops)] == [
        "layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp",
    ]  # fmt: skip
    with fastvit.use_backend("reference"):
        assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize("output_fmt", [None, "NHWC", "NCHW", "NLC", "NCL"])
@pytest.mark.parametrize("size", [{}, {"strict_img_size": False}, {"strict_img_size": False, "dynamic_img_pad": True}])
def test_patch_embed_matches_timm(timm, output_fmt, size):
    arguments = dict(img_size=(16, 24), patch_size=(4, 8), embed_dim=DIM, output_fmt=output_fmt, **size)
    theirs = randomise(timm.layers.PatchEmbed(**arguments)).double()
    ours = layers.PatchEmbed(**arguments).double()
    ours.load_state_dict(theirs.state_dict())
    for attribute in ("img_size", "patch_size", "grid_size", "num_patches"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert (ours.feat_ratio(), ours.feat_ratio(False)) == (theirs.feat_ratio(), theirs.feat_ratio(False))
    shape = {0: (16, 24), 1: (8, 32), 2: (9, 30)}[len(size)]
    images = torch.randn(2, 3, *shape, dtype=torch.float64)
    assert ours.dynamic_feat_size(shape) == theirs.dynamic_feat_size(shape)
    with fastvit.use_backend("reference"):
        assert (ours(images) - theirs(images)).abs().max() < 1e-12
    if len(size) < 2:
        with pytest.raises(ValueError, match="images are 9 x 30 pixels, expected"):
            ours(torch.zeros(2, 3, 9, 30, dtype=torch.float64))


def test_patch_embed_takes_new_sizes_like_timm(timm):
    theirs = randomise(timm.layers.PatchEmbed(img_size=24, patch_size=8, embed_dim=DIM))
    ours = layers.PatchEmbed(img_size=24, patch_size=8, embed_dim=DIM)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        module.set_input_size(img_size=(30, 42), patch_size=6)
    assert (ours.img_size, ours.patch_size, ours.grid_size) == (theirs.img_size, theirs.patch_size, theirs.grid_size)
    assert torch.allclose(ours.proj.weight, theirs.proj.weight, atol=1e-6)
    assert torch.equal(ours.proj.bias, theirs.proj.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resampling_matches_timm(timm, dtype, prefix):
    table = torch.randn(1, prefix + 49, 16).to(dtype)
    for new, old in (((7, 7), None), ((5, 9), None), ((14, 14), (7, 7)), ((7, 7), (1, 49)), ((3, 2), None)):
        expected = timm.layers.resample_abs_pos_embed(table, list(new), old, num_prefix_tokens=prefix)
        assert torch.equal(resample_pos_embed(table, new, old, prefix), expected)
    with pytest.raises(ValueError, match="form no square grid"):
        resample_pos_embed(table[:, :-1], (3, 3), None, prefix)


def test_patch_weight_resampling_matches_timm(timm):
    weight = torch.randn(5, 3, 16, 16)
    for size in ((8, 8), (14, 14), (32, 30), (16, 16)):
        expected = timm.layers.resample_patch_embed(weight, list(size))
        assert torch.allclose(resample_patch_weight(weight, size), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"gated": True, "qkv_bias": True}, {"attn_head_dim": 8, "dim_out": 24}, {"qk_norm": True, "scale_norm": True}],
)
def test_attention_module_matches_timm(timm, options):
    theirs = randomise(timm.layers.Attention(DIM, HEADS, norm_layer=timm.layers.LayerNorm, **options)).double()
    ours = layers.Attention(DIM, HEADS, norm_layer=layers.LayerNorm, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    with fastvit.use_backend("reference"):
        assert_equal(outcome(ours, ours, x), outcome(theirs, theirs, x))
    ours.fused_attn = False
    assert_equal(outcome(ours, ours, x), outcome(theirs, theirs, x))


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "latent_len": 3, "pool_type": ""}, {"pool_type": "avg", "latent_len": 2},
     {"out_features": 0, "q_proj": False}, {"pos_embed": "abs", "feat_size": TOKENS}],
)  # fmt: skip
def test_attention_pool_matches_timm(timm, options):
    arguments = {"in_features": DIM, "num_heads": HEADS, **options}
    theirs = timm.layers.AttentionPoolLatent(**arguments, norm_layer=timm.layers.LayerNorm)
    torch.manual_seed(4)
    theirs.init_weights()
    ours = pool.AttentionPoolLatent(**arguments, norm_layer=layers.LayerNorm)
    torch.manual_seed(4)
    ours.init_weights()
    assert torch.equal(ours.latent, theirs.latent)
    ours.load_state_dict(randomise(theirs).state_dict())
    ours, theirs, x = ours.double(), theirs.double(), tokens()
    with fastvit.use_backend("reference"):
        assert_equal(outcome(ours, ours, x), outcome(theirs, theirs, x))


def test_parameter_free_pool_matches_timm(timm):
    for pool_type in ("token", "avg"):
        theirs = timm.layers.AttentionPoolPrr(DIM, HEADS, pool_type=pool_type, post_norm=True).double()
        ours = pool.AttentionPoolPrr(DIM, HEADS, pool_type=pool_type, post_norm=True).double()
        x = tokens()
        assert_equal(outcome(ours, ours, x), outcome(theirs, theirs, x))


def test_patch_dropout_matches_timm(timm):
    for ordered in (False, True):
        theirs, ours = timm.layers.PatchDropout(0.4, 2, ordered), layers.PatchDropout(0.4, 2, ordered)
        x = tokens()
        torch.manual_seed(1)
        expected = theirs.train()(x)
        torch.manual_seed(1)
        assert torch.equal(ours.train()(x), expected)
        assert ours.eval()(x) is x


def test_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="norm_layer is 'batchnorm'"):
        norm_act.get_norm_layer("batchnorm")
    with pytest.raises(ValueError, match="act_layer is 'gelou'"):
        norm_act.get_act_layer("gelou")
    with pytest.raises(ValueError, match="attn_layer is 'diff'"):
        layers.Block(DIM, HEADS, attn_layer="diff")
    with pytest.raises(ValueError, match="multiple of num_heads"):
        layers.Attention(50, 3)
    with pytest.raises(ValueError, match="hidden_features is 3"):
        layers.GluMlp(DIM, 3)
    with pytest.raises(ValueError, match="use_conv is True"):
        layers.Mlp(DIM, use_conv=True)
    with pytest.raises(ValueError, match="output_fmt is 'CHW'"):
        layers.PatchEmbed(output_fmt="CHW")
    with pytest.raises(ValueError, match=r"prob is 1\.0"):
        layers.PatchDropout(1.0)
