"""The CUDA part in unkind surroundings: odd inputs, failing launches, other cards, devices and streams."""

import cuda_on_cpu
import pytest
import torch
from cuda_device import DEVICES, HAS_GPU, Device
from cuda_passes import PASSES, PRODUCTS
from test_cuda_kernels import on_the_kernels

import fastvit
from fastvit import _extension, reference, testing
from fastvit.ops import _contract, _cuda, _sm90

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPS = ("layernorm_linear", "linear_residual", "layernorm_mlp")
SMALL = testing.Shape(48, 3, 96, 17)
PATHS = {"cublas": (8, 0), "hopper": (9, 0)}
OLDER_AND_NEWER = [(7, 5), (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)]
needs_fibers = pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())


@pytest.fixture(params=DEVICES)
def device(request):
    return Device(request.param)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Both ways through fastvit/ops/_cuda.py, on any card that has the way."""
    use_path(request.param, monkeypatch)
    return request.param


def use_path(path, monkeypatch):
    if HAS_GPU:
        capability, multiprocessors = _sm90.device_facts(0)
        if path == "hopper" and capability != (9, 0):
            pytest.skip("the products run on a GPU of compute capability 9.0")
        monkeypatch.setattr(_sm90, "device_facts", lambda index: (PATHS[path], multiprocessors))


@pytest.fixture
def fused(device, path, monkeypatch):
    """op -> a function like fastvit.reference's, on the kernels."""
    if device.name == "cpu":
        return lambda op: on_the_kernels(op, device, PATHS[path], monkeypatch)
    monkeypatch.setattr(fastvit.dispatch, "_choice", {"*": "cuda"})
    return lambda op: getattr(fastvit.ops, op)


def shifted(value):
    """At an odd element of a buffer: no row starts at a multiple of 16 bytes."""
    buffer = torch.full((value.numel() + 1,), float("nan"), dtype=value.dtype, device=value.device)
    return buffer[1:].view(value.shape).copy_(value)


def columns_apart(value):
    return torch.stack([value, torch.full_like(value, float("nan"))], -1)[..., 0]


def rows_backwards(value):
    """Samples in memory in the other order of dimensions."""
    return value.transpose(0, 1).contiguous().transpose(0, 1) if value.dim() > 1 else value


def without_strides(value):
    """One row for all: the stride is zero."""
    return value[(slice(0, 1),) * (value.dim() - 1)].expand(value.shape) if value.dim() == 3 else value


ODD = (shifted, testing.sliced, columns_apart, rows_backwards, without_strides)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("odd", ODD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
def test_odd_inputs(fused, device, op, odd, dtype):
    """Every tensor misaligned, with gaps, transposed or expanded: taken by some kernel, never misread."""
    given = testing.make_inputs(op, SMALL, 3, dtype, device.name)
    given = {name: odd(value.detach()).requires_grad_() for name, value in given.items()}
    testing.assert_op_as_accurate(op, fused(op), given)


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(fused, device, op):
    """Norms and scales in any floating dtype beside the weights'."""
    given = testing.make_inputs(op, SMALL, 3, BF16, device.name)
    kinds = {"norm_weight": F16, "norm_bias": F32, "layer_scale": F16}
    given = {name: value.detach().to(kinds.get(name, BF16)).requires_grad_() for name, value in given.items()}
    row_scale = {} if op == "layernorm_linear" else {"row_scale": device.draw(3, dtype=torch.float64)}

    def meaning(dtype):
        return testing.cast_inputs({**given, **row_scale}, dtype)

    ours = testing.run_with_gradients(fused(op), {**given, **row_scale})
    exact = testing.run_with_gradients(getattr(reference, op), meaning(torch.float64))
    eager = testing.run_with_gradients(getattr(reference, op), meaning(BF16))
    for name, value in ours.items():
        wanted = given[name.removeprefix("grad_")].dtype if name != "output" else BF16
        assert value.dtype == wanted, name
        testing.assert_as_accurate(value.to(BF16), eager[name], exact[name], name)


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch(fused, device, op):
    given = testing.make_inputs(op, SMALL, 0, BF16, device.name)
    ours = testing.run_with_gradients(fused(op), given)
    for name, wanted in testing.run_with_gradients(getattr(reference, op), given).items():
        assert ours[name].shape == wanted.shape, name
        assert not ours[name].any(), name


@pytest.mark.parametrize("change", ["optimiser", "data", "no_grad"])
@pytest.mark.parametrize("op", OPS)
def test_changed_weights_are_never_served_stale(fused, device, op, change):
    """Nothing made of a weight outlives the call."""
    given = testing.make_inputs(op, SMALL, 3, BF16, device.name)
    run = fused(op)
    weights = {name: value for name, value in given.items() if value.dim() < 3}
    before = testing.run_with_gradients(run, given)
    if change == "optimiser":
        for value in weights.values():
            value.grad = torch.randn_like(value)
        torch.optim.SGD(weights.values(), lr=0.1).step()
    for value in weights.values():
        if change == "data":
            value.data.copy_(torch.randn_like(value))
        elif change == "no_grad":
            with torch.no_grad():
                value.mul_(1.5)
    after = testing.run_with_gradients(run, given)
    fresh = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    for name, wanted in testing.run_with_gradients(run, fresh).items():
        assert torch.equal(after[name], wanted), name
    assert not torch.equal(after["output"], before["output"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_does_not_see_its_batch(device, dtype):
    """Every pass gives a sample the same bits alone, in pairs, and among 64."""
    ops, tokens, samples, width = device.ops, 5, 64, 192
    x, dy = (device.draw(samples * tokens, width, dtype=dtype) for _ in range(2))
    weight, bias = device.draw(width, dtype=dtype), device.draw(width, dtype=dtype)
    row_scale = device.draw(samples, dtype=dtype)

    def run(batch):
        rows = slice(batch * tokens)
        part, grad, scale = x[rows], dy[rows], row_scale[:batch]
        y, mean, rstd = ops.layernorm_fwd(part, weight, bias, 1e-6, dtype)
        dx, *_, again = ops.layernorm_bwd(grad, part, mean, rstd, weight, bias, grad, True, True)
        a, da, same = torch.empty_like(part), grad.clone(), torch.empty_like(part)
        ops.act_fwd(part, a, "gelu")
        ops.act_bwd(da, part, same, "gelu", dtype)
        scaled = ops.scale(part, scale, weight, dtype, F32)[0]
        out = ops.scale_residual_fwd(part, grad, weight, scale, dtype)
        return y, mean, rstd, dx, again, a, da, same, scaled, out

    everything = run(samples)
    for batch in (1, 2, 7):
        for index, (got, wanted) in enumerate(zip(run(batch), everything, strict=True)):
            assert torch.equal(got, wanted[: batch * tokens]), (batch, index)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_an_image_does_not_see_its_batch(device, op, dtype, monkeypatch):
    """Whole ops on Hopper's products. cuBLAS, elsewhere, chooses its kernels by the number of rows."""
    use_path("hopper", monkeypatch)
    if device.name == "cpu":
        run, shape = on_the_kernels(op, device, (9, 0), monkeypatch), SMALL
    else:
        monkeypatch.setattr(fastvit.dispatch, "_choice", {"*": "cuda"})
        run, shape = getattr(fastvit.ops, op), testing.VIT_SHAPES["base"]
    given = {name: value.detach() for name, value in testing.make_inputs(op, shape, 64, dtype, device.name).items()}
    everything = run(**given)
    for batch in (1, 2, 7):
        some = {name: value[:batch] if value.dim() == 3 else value for name, value in given.items()}
        assert torch.equal(run(**some), everything[:batch]), batch


def calls(device):
    """Every op of the library with arguments it takes."""
    x, w, v = device.draw(8, 16, dtype=BF16), device.draw(16, 16, dtype=BF16), device.draw(16, dtype=BF16)
    m = device.draw(8)
    return {
        "layernorm_fwd": (x, v, v, 1e-6, BF16),
        "layernorm_bwd": (x, x, m, m, v, v, None, True, True),
        "act_fwd": (x, x.clone(), "gelu"),
        "act_bwd": (x.clone(), x, None, "gelu", BF16),
        "scale_residual_fwd": (x, x, v, None, BF16),
        "scale": (x, None, v, BF16, BF16),
        "column_sum": (x, BF16),
        "layer_scale_bwd": (device.draw(16, 16), w, v, device.draw(16), v),
        "linear_act": (x, w, v, "gelu", True, "small"),
        "linear_residual": (x, w, v, x, v, None, "small"),
        "linear_act_grad": (x, w, x, "gelu", True, BF16, "small"),
    }


@needs_fibers
@pytest.mark.parametrize("name", [fn.__name__ for fn in (*PASSES, *PRODUCTS)])
def test_a_failed_launch_names_its_op(name, monkeypatch):
    device = Device("cpu")
    run, arguments = getattr(device.ops, name), calls(device)[name]
    run(*arguments)
    monkeypatch.setenv(cuda_on_cpu.FAILURE, "701")
    with pytest.raises(RuntimeError, match=f"{name}: too many resources requested for launch"):
        run(*arguments)


@needs_fibers
def test_a_card_without_kernels_is_refused_with_the_reason(monkeypatch):
    """Older than the oldest architecture of the build: other backends run, the forced one says why it cannot."""
    monkeypatch.setattr(torch.ops, "fastvit_cuda", Device("cpu").ops, raising=False)
    monkeypatch.setattr(_extension, "WHY_NOT_CUDA", [])
    monkeypatch.setattr(_contract, "why_not_device", lambda *_: [])
    _extension._ask_card.cache_clear()
    x = OnCard()
    assert _contract.why_not_compiled("cuda", x, x) == []
    _extension._ask_card.cache_clear()
    monkeypatch.setenv(cuda_on_cpu.FAILURE, "209")
    reason = "the CUDA library has no kernels for cuda:1 (no kernel image is available for execution on the device)"
    assert _contract.why_not_compiled("cuda", x, x) == [reason]
    compiled = torch.compile(lambda t: t + len(_extension.why_not_card(1)), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == len(reason)
    _extension._ask_card.cache_clear()


class OnCard:
    """As much of a tensor on cuda:1 as the refusals look at."""

    device = torch.device("cuda", 1)
    dtype = F32


@pytest.mark.parametrize("capability", OLDER_AND_NEWER, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_other_cards_take_the_portable_path(capability, monkeypatch):
    """Hopper's products ask for 227 KB of shared memory: no other card is given one, and the reason names it."""
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    device = Device("cpu")
    run = on_the_kernels("layernorm_mlp", device, capability, monkeypatch)
    x = device.draw(8, 48, dtype=BF16)
    (reason,) = _sm90.why_not(_cuda.ops, 48, x=x, weight=x)
    assert f"compute capability {capability[0]}.{capability[1]}, Hopper's products need 9.0" in reason
    monkeypatch.setattr(_sm90._tiles, "choose", lambda *_: pytest.fail("a product of Hopper's was chosen"))
    testing.assert_op_as_accurate("layernorm_mlp", run, testing.make_inputs("layernorm_mlp", SMALL, 2, BF16))


def test_more_errors_name_tensor_rule_and_what_came(device):
    ops, x, w, m = device.ops, device.draw(4, 8, dtype=BF16), device.draw(8, dtype=BF16), device.draw(4)
    with pytest.raises(RuntimeError, match="layernorm_fwd: weight and bias have two dtypes, expected one"):
        ops.layernorm_fwd(x, w, w.float(), 1e-6, BF16)
    with pytest.raises(RuntimeError, match="layernorm_fwd: weight is float16, expected float32 or the dtype of x"):
        ops.layernorm_fwd(x, w.to(F16), None, 1e-6, BF16)
    with pytest.raises(RuntimeError, match="layernorm_fwd: weight is not contiguous, expected a stride of 1"):
        ops.layernorm_fwd(x, torch.stack([w, w], 1)[:, 0], None, 1e-6, BF16)
    with pytest.raises(RuntimeError, match="layernorm_bwd: dresidual and x have two dtypes, expected one"):
        ops.layernorm_bwd(x, x, m, m, None, None, x.float(), False, False)
    with pytest.raises(RuntimeError, match="act_bwd: h and da have two dtypes, expected one"):
        ops.act_bwd(x, x.float(), None, "gelu", None)
    with pytest.raises(RuntimeError, match="scale_residual_fwd: residual and the result have two dtypes, expected one"):
        ops.scale_residual_fwd(x, x, None, None, F32)
    with pytest.raises(RuntimeError, match=r"layer_scale_bwd: weight has shape \(3, 8\), expected \(4, 8\) like g"):
        ops.layer_scale_bwd(x.float(), x[:3], None, None, w[:3])
    with pytest.raises(RuntimeError, match="layer_scale_bwd: g and float32 have two dtypes, expected one"):
        ops.layer_scale_bwd(x, x, None, None, w[:4])


@pytest.fixture
def on_gpu(path, monkeypatch):
    """op, device -> its result and gradients on that GPU, by the path."""
    if not HAS_GPU:
        pytest.skip("no GPU, or the CUDA library is not built")
    monkeypatch.setattr(fastvit.dispatch, "_choice", {"*": "cuda"})

    def run(op, inputs):
        return testing.run_with_gradients(getattr(fastvit.ops, op), inputs)

    return run


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_other_device(on_gpu, op, dtype):
    """Inputs on cuda:1 while cuda:0 is current: the bits of cuda:0, and it stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    given = testing.make_inputs(op, testing.VIT_SHAPES["tiny"], 3, dtype, "cuda:0")
    moved = {name: value.detach().to("cuda:1").requires_grad_() for name, value in given.items()}
    with torch.cuda.device(0):
        first, second = on_gpu(op, given), on_gpu(op, moved)
        assert torch.cuda.current_device() == 0
    for name, wanted in first.items():
        assert second[name].device == torch.device("cuda:1"), name
        assert torch.equal(second[name].cpu(), wanted.cpu()), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_side_stream(on_gpu, op, dtype):
    """The inputs are written late on a stream of their own: a kernel on any other stream would read NaN."""
    given = testing.make_inputs(op, testing.VIT_SHAPES["tiny"], 3, dtype, "cuda")
    wanted = on_gpu(op, given)
    late = {name: torch.full_like(value, float("nan")).requires_grad_() for name, value in given.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for name, value in late.items():
                value.copy_(given[name])
        ours = on_gpu(op, late)
    side.synchronize()
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name
