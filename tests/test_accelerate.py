"""fastvit.accelerate on timm's models: the same outputs and gradients, whatever is done to the model afterwards."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import accelerate, dispatch, explain, restore
from fastvit.testing import assert_as_accurate

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build(timm):
    """timm's VisionTransformer in a tiny size, every parameter far enough from zero to matter."""

    def make(**overrides):
        cls = overrides.pop("cls", timm.models.vision_transformer.VisionTransformer)
        return scatter(cls(**(SIZES | overrides)))

    return make


def scatter(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and "embed" not in name and "token" not in name else 0.3
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(center + scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def is_overridden(module):
    return "forward" in vars(module)


def images(batch=3, height=32, width=32, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5)).to(dtype)


def results(model, x, **kwargs):
    """The output and the gradient of the input and of every parameter."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(11)
    output = model(x, **kwargs)
    names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    grads = torch.autograd.grad((output * weights).sum(), [x, *params], allow_unused=True)
    return {"output": output.detach(), **dict(zip(["images", *names], grads, strict=True))}


def assert_same_results(model, x, backend="auto", **kwargs):
    """Accelerated ``model`` is as accurate as stock, in its output and in every gradient."""
    restore(model)
    eager = results(model, x, **kwargs)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in kwargs.items()}
    exact = results(copy.deepcopy(model).double(), x.double(), **wide)
    fused = results(accelerate(model, backend=backend), x, **kwargs)
    assert fused.keys() == eager.keys()
    together = ([], [], [])
    for name, value in fused.items():
        assert (value is None) == (eager[name] is None), f"{name}: a gradient here and none there"
        if value is not None:
            assert value.dtype == eager[name].dtype
            unit = exact[name].abs().max().clamp(min=1e-30)
            for values, part in zip(together, (value, eager[name], exact[name]), strict=True):
                values.append((part.double() / unit).flatten())
            # A tensor of five numbers on which stock was lucky proves nothing: one by one the gate is wider.
            assert_as_accurate(value, eager[name], exact[name], name, factor=6.0)
    fused, eager, exact = map(torch.cat, together)
    assert_as_accurate(fused.to(x.dtype), eager.to(x.dtype), exact, "output and gradients together")


class Work(TorchDispatchMode):
    """Adds up the numbers that matrix products give; torch's own counter hooks every module, and nothing is fused."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm):
            self.total += result.numel()
        return result


def work(model, x):
    with Work() as counter, torch.no_grad():
        model(x)
    return counter.total


VARIANTS = {
    "plain": {},
    "layer_scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 3, "init_values": 0.5},
    "deit3": {"no_embed_class": True, "init_values": 0.5},
    "registers_no_embed": {"reg_tokens": 2, "no_embed_class": True},
    "average": {"global_pool": "avg"},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "attention_pool": {"class_token": False, "global_pool": "map"},
    "no_qkv_bias": {"qkv_bias": False},
    "no_proj_bias": {"proj_bias": False},
    "qk_norm": {"qk_norm": True},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "tanh": {"act_layer": "gelu_tanh"},
    "relu": {"act_layer": "relu"},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_final_norm": {"final_norm": False},
    "fc_norm": {"fc_norm": True},
    "no_positions": {"pos_embed": "none"},
    "rms_norm": {"norm_layer": "rmsnorm"},
    "dynamic": {"dynamic_img_size": True},
    "one_block": {"depth": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_as_accurate_as_stock(build, variant, dtype):
    assert_same_results(build(**VARIANTS[variant]).to(dtype), images(dtype=dtype))


@pytest.mark.parametrize("mlp", ["SwiGLU", "SwiGLUPacked"])
def test_gated_mlp(build, timm, mlp):
    assert_same_results(build(mlp_layer=getattr(timm.layers, mlp)), images())


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (16, 24)])
def test_dynamic_image_sizes(build, size):
    assert_same_results(build(dynamic_img_size=True), images(2, *size))
    assert_same_results(build(dynamic_img_size=True, dynamic_img_pad=True), images(2, size[0] - 3, size[1] - 1))


def test_distilled(build, timm):
    model = build(cls=timm.models.deit.VisionTransformerDistilled)
    assert_same_results(model, images())
    assert next(row.reasons for row in explain(model).rows if row.part == "class token only")


@pytest.mark.parametrize("block", ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock"])
def test_other_blocks_are_left_alone(build, timm, block):
    model = build(block_fn=getattr(timm.models.vision_transformer, block))
    assert_same_results(model, images())
    assert all(not is_overridden(b) for b in model.blocks)
    rows = [row for row in explain(model).rows if row.module.startswith("blocks.")]
    assert len(rows) == 2
    assert block in rows[0].reasons[0]


def test_blocks_inside_any_model(timm):
    """A model that only borrows timm's Block, as MAE's does."""
    block = timm.models.vision_transformer.Block
    model = scatter(nn.Sequential(nn.Linear(24, 64), block(64, 2, qkv_bias=True), block(64, 2), nn.Linear(64, 3)))
    assert_same_results(model, torch.randn(2, 9, 24))
    assert is_overridden(model[1])


def test_masks(build):
    model, mask = build(), torch.rand(17, 17) > 0.3
    mask[:, 0] = True
    assert_same_results(model, images(), attn_mask=mask)
    assert_same_results(model, images(), attn_mask=torch.randn(17, 17))
    causal = model(images(), is_causal=True)
    torch.testing.assert_close(causal, restore(model)(images(), is_causal=True))


def test_training_draws_like_stock(build):
    """DropPath takes the same random numbers, so one seed gives one result."""
    model = build(drop_path_rate=0.5, depth=4, init_values=0.5).train()
    assert_same_results(model, images(8))
    torch.manual_seed(1)
    first = model(images(8))
    assert not torch.equal(first, model(images(8)))


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate"])
def test_dropout_follows_its_law(build, rate):
    """Where dropout is active, the means over many draws agree; in eval nothing is dropped."""
    model, x = build(**{rate: 0.3}), images(2)
    assert_same_results(model, x)
    many = x[:1].expand(4000, -1, -1, -1)
    with torch.no_grad():
        stock = restore(model).train()(many)
        fused = accelerate(model)(many)
    assert fused.std(0).min() > 0
    spread = (stock.var(0) / 4000 + fused.var(0) / 4000).sqrt()
    assert ((stock.mean(0) - fused.mean(0)).abs() < 5 * spread).all()


def test_autocast(build):
    model, x = build(init_values=0.5), images()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager, fused = model(x), accelerate(model)(x)
        tokens = model.blocks[0](torch.randn(2, 17, 64))
    assert fused.dtype == eager.dtype
    assert tokens.dtype == torch.float32
    assert_as_accurate(fused, eager, exact)


# Everything that may happen to a model after it was accelerated.


def test_every_hook_is_called(build):
    """A hook on any one module sees what it sees in stock timm, in shape and value, as often."""
    model, x = build(init_values=0.5), images()
    for name, module in list(model.named_modules()):
        seen = []
        handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        stock = restore(model)(x)
        fused = accelerate(model)(x)
        handle.remove()
        count = len(seen) // 2
        assert len(seen) == 2 * count, f"{name}: {len(seen)} calls"
        for before, after in zip(seen[:count], seen[count:], strict=True):
            torch.testing.assert_close(after, before, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(fused, stock)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.norm1", "blocks.1.mlp.act", "blocks.0.attn.qkv", "norm", ""])
def test_other_hooks_are_called(build, name):
    model, calls = accelerate(build()), []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append(grad_out[0].shape))
    model(images()).sum().backward()
    fused = calls[:]
    calls.clear()
    restore(model)(images()).sum().backward()
    assert calls == fused
    assert len(calls) == 2


def test_global_hooks_are_called(build):
    model, counts = accelerate(build()), []
    for _ in range(2):
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: counts[-1].append(type(m)))
        counts.append([])
        model(images())
        handle.remove()
        restore(model)
    assert counts[0] == counts[1]


class LoRA(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.down, self.up = nn.Linear(linear.in_features, 4, bias=False), nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_lora(build, path):
    model = accelerate(build(init_values=0.5))
    for block in model.blocks:
        parent, name = block.get_submodule(path.split(".")[0]), path.split(".")[1]
        block.requires_grad_(False)
        setattr(parent, name, LoRA(getattr(parent, name)))
    overrides = [is_overridden(block) for block in model.blocks]
    fused = results(model, images())
    assert all(overrides)
    assert any("LoRA" in reason for row in explain(model).rows for reason in row.reasons)
    stock = results(restore(model), images())
    for name, value in stock.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)


def _double_weight(module, name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, name, Double())


CHANGES = {
    "parametrised qkv": lambda m: _double_weight(m.blocks[1].attn.qkv, "weight"),
    "parametrised fc1 bias": lambda m: _double_weight(m.blocks[0].mlp.fc1, "bias"),
    "parametrised norm": lambda m: _double_weight(m.blocks[1].norm1, "weight"),
    "parametrised layer scale": lambda m: _double_weight(m.blocks[0].ls2, "gamma"),
    "parametrised patches": lambda m: _double_weight(m.patch_embed.proj, "weight"),
    "parametrised positions": lambda m: _double_weight(m, "pos_embed"),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.blocks[0].mlp.fc2),
    "weight norm": lambda m: parametrizations.weight_norm(m.blocks[1].attn.proj),
    "old weight norm": lambda m: nn.utils.weight_norm(m.blocks[1].attn.proj),
    "pruning": lambda m: prune.l1_unstructured(m.blocks[0].mlp.fc1, "weight", 0.5),
    "no fused attention": lambda m: setattr(m.blocks[1].attn, "fused_attn", False),
    "another norm": lambda m: setattr(m, "norm", nn.Identity()),
    "another activation": lambda m: setattr(m.blocks[0].mlp, "act", nn.Tanh()),
    "no last block": lambda m: m.prune_intermediate_layers([0], prune_head=False),
    "patched forward": lambda m: setattr(m.blocks[1], "forward", lambda x: 2 * x),
    "patched norm": lambda m: setattr(m.blocks[1].norm2, "forward", lambda x: 2 * x),
    "patched head": lambda m: setattr(m, "pool", lambda x, pool_type=None: x.mean(1)),
    "patched features": lambda m: setattr(m, "forward_features", lambda x, **kwargs: m._pos_embed(m.patch_embed(x))),
    "token mixing mlp": lambda m: setattr(m.blocks[1], "mlp", Mix()),
    "new head": lambda m: m.reset_classifier(7, "avg"),
    "new size": lambda m: m.set_input_size((48, 48)),
    "new patch": lambda m: m.set_input_size(patch_size=(16, 16)),
    "checkpointing": lambda m: m.set_grad_checkpointing(),
    "frozen": lambda m: m.blocks.requires_grad_(False),
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "training": lambda m: m.train(),
    "in place": lambda m: m.blocks[0].mlp.fc1.weight.data.mul_(2),
    "new parameter": lambda m: setattr(m.blocks[0].attn.qkv, "weight", nn.Parameter(torch.randn(192, 64))),
    "loaded": lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}),
}


class Mix(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True).expand_as(x)


@pytest.mark.parametrize("change", CHANGES)
def test_change_after_accelerate(build, change):
    """The same change to stock and to an accelerated model: the same results."""
    torch.manual_seed(2)
    stock = build(init_values=0.5)
    fused = accelerate(copy.deepcopy(stock))
    fused(images())
    for model in (stock, fused):
        torch.manual_seed(4)
        CHANGES[change](model)
    assert is_overridden(fused)
    side = 48 if change == "new size" else 32
    x = images(3, side, side, next(stock.parameters()).dtype)
    before, after = results(stock, x), results(fused, x)
    assert before.keys() == after.keys()
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 1e-9}[x.dtype]
    for name, value in before.items():
        scale = 0.0 if value is None else value.abs().max().item()
        torch.testing.assert_close(after[name], value, rtol=tolerance, atol=tolerance * (scale + 1e-6), msg=name)


def test_attention_maps_by_hook(build):
    """With fused_attn off, a hook on attn_drop sees the attention weights of every block, as in timm."""
    model, maps = accelerate(build()), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    model(images())
    assert [m.shape for m in maps] == [(3, 2, 17, 17)] * 2
    torch.testing.assert_close(torch.stack(maps).sum(-1), torch.ones(2, 3, 2, 17))


def test_optimiser_steps(build):
    """Weights change under the accelerated model: three steps end where stock's end."""
    ends = []
    for prepare in (lambda m: m, accelerate):
        model = prepare(build(init_values=0.5)).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            loss = model(images()).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                model.eval()(images())
            model.train()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


# The class token alone, and the whole tokens of everybody else.


def test_class_token_only_does_less(build):
    model, x = build(depth=3), images()
    whole = work(accelerate(model, cls_only_last_block=False, backend="torch"), x)
    less = work(accelerate(model, backend="torch"), x)
    assert less < 0.85 * whole
    torch.testing.assert_close(model(x), restore(model)(x))


READERS = {
    "average": lambda m: m.reset_classifier(5, "avg"),
    "hook on the block": lambda m: m.blocks[-1].register_forward_hook(lambda *_: None),
    "hook inside": lambda m: m.blocks[-1].mlp.act.register_forward_hook(lambda *_: None),
    "hook on norm": lambda m: m.norm.register_forward_hook(lambda *_: None),
    "hook on blocks": lambda m: m.blocks.register_forward_hook(lambda *_: None),
    "mixing": lambda m: setattr(m.blocks[-1], "mlp", Mix()),
    "attention maps": lambda m: setattr(m.blocks[-1].attn, "fused_attn", False),
    "patched pool": lambda m: setattr(m, "pool", lambda x, pool_type=None: x.mean(1)),
}


@pytest.mark.parametrize("reader", READERS)
def test_last_block_is_whole_when_read(build, reader):
    model, x = build(), images()
    READERS[reader](model)
    whole = work(accelerate(model, cls_only_last_block=False, backend="torch"), x)
    assert work(accelerate(model, backend="torch"), x) == whole
    row = next(row for row in explain(model).rows if row.part == "class token only")
    assert not row.fused
    assert row.reasons


def test_features_stay_whole(build):
    model, x = build(reg_tokens=2), images()
    calls = (
        lambda: model.forward_features(x),
        lambda: model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True),
        lambda: model.get_intermediate_layers(x, n=2, reshape=True, norm=True),
        lambda: model.forward_head(model.forward_features(x), pre_logits=True),
    )
    stock = [call() for call in calls]
    accelerate(model)
    for call, expected in zip(calls, stock, strict=True):
        torch.testing.assert_close(call(), expected)


# Options, choices and refusals.


def test_same_model_and_back(build):
    model = build()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    classes, parameters = [type(m) for m in model.modules()], dict(model.named_parameters())
    stock = model(images())
    assert accelerate(model) is model
    assert accelerate(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(parameters)
    torch.testing.assert_close(model(images()), stock)
    assert restore(model) is model
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(restore(model)(images()), stock)


def test_filter(build):
    model, names = build(), []

    def only_second(module, name):
        names.append(name)
        return name == "blocks.1"

    accelerate(model, filter_fn=only_second)
    assert names == ["", "blocks.0", "blocks.1"]
    assert [is_overridden(m) for m in (model, *model.blocks)] == [False, False, True]
    accelerate(model, filter_fn=lambda module, name: name == "blocks.0")
    assert [is_overridden(m) for m in (model, *model.blocks)] == [False, True, False]


def test_backend_is_forced_for_this_model_alone(build):
    model, other, x = accelerate(build(), backend="reference"), accelerate(build()), images()
    with dispatch.recording() as calls:
        model(x)
    assert calls
    assert {backend for _, backend in calls} == {"reference"}
    with dispatch.recording() as calls:
        other(x)
        model.norm_pre(x)
    assert "reference" not in {backend for _, backend in calls}
    accelerate(model, backend={"layernorm_mlp": "reference"})
    with dispatch.recording() as calls:
        model.blocks[0](torch.randn(1, 5, 64))
    assert ("layernorm_mlp", "reference") in calls
    assert ("linear_residual", "reference") not in calls


def test_forced_backend_ends_with_the_call(build):
    model = accelerate(build(), backend="reference")
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(images(1, 40, 40))
    with dispatch.recording() as calls:
        accelerate(build())(images())
    assert "reference" not in {backend for _, backend in calls}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "triton"}, ValueError, "layernorm_mlp.*op by op.*'attention': 'triton'"),
        ({"backend": "tpu"}, ValueError, "'tpu'.*expected one of auto, triton"),
        ({"backend": {"softmax": "torch"}}, ValueError, "'softmax'.*expected one of"),
        ({"backend": 3}, TypeError, "backend is a int"),
        ({"memory": "lean"}, ValueError, "memory is 'lean', available: 'default'"),
    ],
)
def test_refusals(build, arguments, error, message):
    model = build()
    with pytest.raises(error, match=message):
        accelerate(model, **arguments)
    assert not is_overridden(model)


@pytest.mark.parametrize("function", [accelerate, restore, explain])
def test_not_a_model(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: model is a dict, expected a torch\.nn\.Module"):
        function({})


def test_stock_refuses_as_before(build):
    model = accelerate(build())
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(RuntimeError):
        model(images().double())


def test_nothing_to_do():
    model = nn.Sequential(nn.Linear(4, 4))
    assert accelerate(model) is model
    assert not explain(model).rows
    assert "Sequential holds no ViT" in str(explain(model))


def test_subclass_with_its_own_forward(build, timm):
    class Louder(timm.models.vision_transformer.Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x, attn_mask, is_causal)

    model = build(block_fn=Louder)
    assert_same_results(model, images())
    assert not is_overridden(model.blocks[0])


def test_forward_patched_before(build):
    model = build()
    model.blocks[0].forward = lambda x: 2 * x
    assert_same_results(model, images())
    assert any("replaced on this instance" in r for row in explain(model).rows for r in row.reasons)


# explain


def test_explain_says_what_runs(build):
    model = build()
    assert not any(row.fused for row in explain(model).rows)
    rows = {(row.module, row.part): row for row in explain(accelerate(model, backend="torch")).rows}
    ops = ("layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp")
    expected = [("", "patch_embed"), ("", "class token only"), *((f"blocks.{i}", op) for i in range(2) for op in ops)]
    assert list(rows) == expected
    assert all(row.fused and not row.reasons for row in rows.values())
    assert {row.backend for row in rows.values()} == {"torch", ""}
    assert "triton" in rows["blocks.0", "attention_packed"].refused
    assert "blocks.0 .. 1" in str(explain(model))
    with dispatch.recording() as calls:
        model(images())
    assert {op for op, _ in calls} >= {op for op in ops if op != "attention_packed"}


def test_explain_matches_what_runs(build):
    """The backends that explain names are those that the ops are then run on."""
    model = accelerate(build(global_pool="avg"))
    said = {row.part: row.backend for row in explain(model).rows if row.fused}
    with dispatch.recording() as calls, torch.no_grad():
        model(images())
    assert dict(calls) == said


EXPLAINED = {
    "norm1": ("blocks.0.norm1", {"layernorm_linear"}),
    "qkv": ("blocks.0.attn.qkv", {"layernorm_linear"}),
    "attention": ("blocks.0.attn", {"layernorm_linear", "attention_packed", "linear_residual"}),
    "q_norm": ("blocks.0.attn.q_norm", {"attention_packed"}),
    "proj": ("blocks.0.attn.proj", {"linear_residual"}),
    "drop_path": ("blocks.0.drop_path1", {"linear_residual"}),
    "fc1": ("blocks.0.mlp.fc1", {"layernorm_mlp"}),
    "norm2": ("blocks.0.norm2", {"layernorm_mlp"}),
    "ls2": ("blocks.0.ls2", {"layernorm_mlp"}),
    "patches": ("patch_embed.proj", {"patch_embed"}),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_names_the_part_that_is_not_fused(build, case):
    path, parts = EXPLAINED[case]
    model = accelerate(build(init_values=0.5))
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    rows = [row for row in explain(model).rows if not row.fused and row.module in ("", "blocks.0")]
    assert {row.part for row in rows} == parts
    assert all("has hooks" in row.reasons[0] for row in rows)
    assert "has hooks" in str(explain(model))


def test_explain_keeps_quiet(build):
    """explain runs nothing: no hook fires, no random number is drawn."""
    model, calls = accelerate(build(drop_path_rate=0.1)).train(), []
    nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1)).remove()
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    str(explain(model))
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


# fastvit's own model


def native(**overrides):
    from fastvit.model import VisionTransformer

    return scatter(VisionTransformer(**(SIZES | overrides)))


def test_native_model_is_fast_already():
    model, x = native(depth=3), images()
    before = model(x)
    accelerate(model)
    assert not is_overridden(model)
    assert all(row.fused for row in explain(model).rows)
    with fastvit.use_backend("torch"):
        less = work(model, x)
    assert torch.equal(model(x), before)
    accelerate(model, cls_only_last_block=False, backend="torch")
    assert work(model, x) > 1.15 * less
    torch.testing.assert_close(model(x), before)
    assert "cls_only_last_block is False" in str(explain(model))
    assert torch.equal(restore(model)(x), before)


def test_native_model_takes_a_backend():
    model = accelerate(native(), backend="reference")
    with dispatch.recording() as calls:
        model(images())
        model.forward_features(images())
    assert ("layernorm_mlp", "reference") in calls
    assert {backend for op, backend in calls if op != "patch_embed"} == {"reference"}
