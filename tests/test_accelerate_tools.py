"""Accelerated models under copying, pickling, compilers, tracers, torch.func and the data-parallel wrappers."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from tiny_vits import SIZES, build, images, is_overridden, native, one_thread, results
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from fastvit import accelerate, dispatch, restore
from fastvit.testing import assert_as_accurate


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": save_and_load,
    "deepcopy of a wrapper": lambda model: copy.deepcopy(nn.ModuleList([model]))[0],
    "deepcopy twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "replica": lambda model: replicate(model),
}


def replicate(model):
    """What nn.DataParallel does for a second device, on this one."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, nn.Parameter(parameter.detach().clone()))
    replica = copies[model]
    replica.keep = list(copies.values())
    return replica


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_runs_on_its_own_parameters(how):
    model = accelerate(build(init_values=0.5), backend="reference")
    before = model(images())
    twin = COPIES[how](model)
    torch.testing.assert_close(twin(images()), before)
    assert is_overridden(twin)
    assert is_overridden(twin.blocks[0])
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
    torch.testing.assert_close(twin(images()), before)
    torch.testing.assert_close(twin.blocks[1](before.new_ones(1, 3, 64)), twin.blocks[1](before.new_ones(1, 3, 64)))
    del model
    gc.collect()
    torch.testing.assert_close(twin(images()), before)
    restored = restore(twin)
    assert not any(is_overridden(module) for module in restored.modules())
    torch.testing.assert_close(restored(images()), before)


def test_a_model_is_freed_at_once():
    """No cycle keeps the parameters alive until the garbage collector comes round."""
    model = accelerate(build())
    alive = weakref.ref(model.blocks[0].mlp.fc1.weight)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_exponential_average():
    model = accelerate(build()).train()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    average.update_parameters(model)
    stock = build()
    stock.load_state_dict({k: 1.25 * v for k, v in stock.state_dict().items()})
    torch.testing.assert_close(average.eval()(images()), stock(images()), rtol=1e-4, atol=1e-5)


def test_signature_is_the_class_s_own():
    model = build()
    before = inspect.signature(model.forward)
    assert inspect.signature(accelerate(model).forward) == before


def test_wrapped_forward():
    """Other libraries wrap ``module.forward`` and put their own in its place."""
    model = accelerate(build())
    expected, fast = model(images()), model.blocks[1].forward
    model.blocks[1].forward = lambda x, *args, **kwargs: fast(x, *args, **kwargs) - x
    changed = model(images())
    assert not torch.allclose(changed, expected)
    stock = build()
    slow = stock.blocks[1].forward
    stock.blocks[1].forward = lambda x, *args, **kwargs: slow(x, *args, **kwargs) - x
    torch.testing.assert_close(changed, stock(images()))


@pytest.mark.parametrize(("training", "backend"), [(True, "auto"), (False, "torch")])
def test_compile_whole(training, backend):
    """One graph, forward and backward, with the same draws."""
    torch._dynamo.reset()
    model = build(init_values=0.5, drop_path_rate=0.3 if training else 0.0, reg_tokens=2).train(training)
    exact = results(copy.deepcopy(model).double(), images().double())
    eager = results(model, images())
    compiled = results(torch.compile(accelerate(model, backend=backend), fullgraph=True, backend="aot_eager"), images())
    assert len(compiled) == len(eager)
    for (name, value), before in zip(compiled.items(), eager, strict=True):
        assert_as_accurate(value, eager[before], exact[before], name, factor=6.0)


@pytest.mark.parametrize("options", [{}, {"global_pool": "map", "dynamic_img_size": True}])
@pytest.mark.parametrize("make", [lambda **options: accelerate(build(**options)), native], ids=["timm", "ours"])
def test_compile_whole_under_a_default_device(make, options):
    model = make(**options)
    expected = model(images())
    torch._dynamo.reset()
    with torch.device("cpu"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), expected)


def test_compiled_graph_is_the_fast_one():
    """Compilation must not quietly take the stock way: only ours cuts the class token out in the last block."""
    torch._dynamo.reset()
    graphs = []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(accelerate(build()), fullgraph=True, backend=look)(images())
    torch._dynamo.reset()
    torch.compile(accelerate(build(), cls_only_last_block=False), fullgraph=True, backend=look)(images())
    assert ["slice(None, 1, None)" in graph for graph in graphs] == [True, False]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = build(init_values=0.5)
    expected = model(images())
    program = torch.export.export(accelerate(model), (images(),), strict=strict)
    torch.testing.assert_close(program.module()(images()), expected)


def test_script():
    model = build(init_values=0.5)
    expected, script = model(images()), torch.jit.script(accelerate(model))
    torch.testing.assert_close(script(images()), expected)
    assert is_overridden(model)
    assert is_overridden(model.blocks[0])
    with torch.no_grad():
        model.head.bias += 1
    torch.testing.assert_close(script(images()), expected + 1)
    with pytest.raises(ValueError, match=r"expected it before torch\.jit\.script"):
        accelerate(script)


def test_jit_trace():
    model = accelerate(build())
    trace = torch.jit.trace(model, images())
    assert "fastvit" not in str(trace.inlined_graph)
    torch.testing.assert_close(trace(images(5)), restore(model)(images(5)))


def test_fx(timm):
    model = build()
    expected, features = model(images()), model.forward_features(images())
    accelerate(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), expected)
    extractor = timm.models.create_feature_extractor(model, ["norm"])
    torch.testing.assert_close(extractor(images())["norm"], features)


def test_attention_extract(timm):
    """timm's own tool for attention maps."""
    model = build()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = timm.utils.AttentionExtract(copy.deepcopy(model), method="fx")(images())
    maps = timm.utils.AttentionExtract(accelerate(model), method="fx")(images())
    assert list(maps) == list(expected)
    assert len(maps) == 2
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value)


def test_gradients_for_each_sample():
    model, x = build(init_values=0.5), images()
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    def each_sample():
        return vmap(grad(loss), (None, 0))(parameters, x)

    expected = each_sample()
    accelerate(model)
    with dispatch.recording() as calls:
        fused = each_sample()
    assert not calls, "the fused ops have no rule for vmap"
    for name, value in fused.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_forward_mode():
    """Through the unfused attention, the only one that stock PyTorch differentiates forwards on a CPU."""
    model, x = build(), images()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = jvp(model, (x,), (x,))
    accelerate(model)
    with dispatch.recording() as calls:
        for value, wanted in zip(jvp(model, (x,), (x,)), expected, strict=True):
            torch.testing.assert_close(value, wanted)
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, x))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[1])
    assert not calls, "the fused ops have no forward derivative"


def test_gradient_checkpointing():
    model, x = build(drop_path_rate=0.4).train(), images()
    expected = results(model, x)
    model.set_grad_checkpointing()
    with dispatch.recording() as calls:
        fused = results(accelerate(model), x)
    assert [op for op, _ in calls].count("layernorm_mlp") == 2 * len(model.blocks), "each block runs once more"
    for name, value in fused.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_data_parallel():
    stock, x = build(init_values=0.5).train(), images()
    expected = results(stock, x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(accelerate(stock))
        weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
        (model(x) * weights).sum().backward()
        # It must not be the last to hold the group: it would wait for the group's threads, and they for Python's lock
        del model
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_state_dict_goes_both_ways():
    model, stock = accelerate(build()), build()
    assert list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert SIZES["depth"] == len(model.blocks)


def test_meta_device():
    with torch.device("meta"):
        model = accelerate(type(build())(**SIZES))
    model.to_empty(device="cpu").load_state_dict(build().state_dict())
    torch.testing.assert_close(model.eval()(images()), build()(images()))
