"""Hopper's products (csrc/cuda/sm90) against float64.

Where torch.cuda.is_available() on compute capability 9.0 the kernels run; everywhere else the same glue runs on plain
loops with the kernels' own epilogue arithmetic (sm90_on_cpu.cpp), which models their rounding.
"""

import itertools
import re
import subprocess
from pathlib import Path

import cuda_on_cpu
import cuda_passes
import pytest
import torch
from cuda_device import DEVICES, Device, prove

from fastvit import reference, testing
from fastvit.ops import _tiles

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_GPU = "the products run on a GPU of compute capability 9.0"
TILES = list(itertools.product([BF16, F16], ["large", "small"]))


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not (IS_HOPPER and hasattr(torch.ops.fastvit_cuda, "linear_act")):
        pytest.skip(ON_GPU)
    return Device(request.param)


@pytest.fixture
def gpu():
    if not (IS_HOPPER and hasattr(torch.ops.fastvit_cuda, "linear_act")):
        pytest.skip(ON_GPU)
    return Device("cuda")


def shapes(device):
    """(rows, cols, depth): ViT's own on a GPU, ragged against every tile in either place."""
    small = [(0, 64, 64), (1, 72, 64), (65, 264, 48), (130, 80, 200)]
    if device.name == "cpu":
        return small
    # the last: four tiles or more for a block of the grid, and a cluster's second tile that is wholly past the last row
    return [*small, (197, 3072, 768), (394, 768, 3072), (257, 4304, 1152), (2600, 3072, 384)]


@pytest.mark.parametrize("act", ["none", *reference.ACTIVATIONS])
@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_linear_act(device, dtype, tile, act):
    for rows, cols, depth in shapes(device):
        x, weight = device.draw(rows, depth, dtype=dtype), device.draw(cols, depth, dtype=dtype, scale=depth**-0.5)
        bias = device.draw(cols, dtype=dtype)
        prove(device, "linear_act", x, weight, bias, act, True, tile)
        prove(device, "linear_act", x, weight, bias.to(F32), act, False, tile)
        prove(device, "linear_act", x, weight, None, act, True, tile)


@pytest.mark.parametrize("stream", ["same", "float32"])
@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_linear_residual(device, dtype, tile, stream):
    """Beside a residual of the operands' dtype, and beside a float32 one as under autocast."""
    for rows, cols, depth in shapes(device):
        x, weight = device.draw(rows, depth, dtype=dtype), device.draw(cols, depth, dtype=dtype, scale=depth**-0.5)
        residual, bias = (
            device.draw(rows, cols, dtype=dtype if stream == "same" else F32),
            device.draw(cols, dtype=dtype),
        )
        layer_scale, row_scale = device.draw(cols, dtype=dtype), device.draw(rows)
        for scales in ((layer_scale, row_scale), (layer_scale.to(F32), None), (None, row_scale), (None, None)):
            prove(device, "linear_residual", x, weight, bias, residual, *scales, tile, stock=autocast_linear_residual)
        prove(device, "linear_residual", x, weight, None, residual, None, None, tile, stock=autocast_linear_residual)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("stream", ["same", "float32"])
def test_joined_calls_are_their_parts(device, stream, save):
    """LayerNorm with the products behind it in one call: the same bits as one by one."""
    ops, rows, width, hidden = device.ops, 65, 48, 264
    x = device.draw(rows, width, dtype=BF16 if stream == "same" else F32)
    norm = device.draw(width, dtype=BF16), device.draw(width, dtype=BF16)
    w1, b1 = device.draw(hidden, width, dtype=BF16, scale=0.1), device.draw(hidden, dtype=BF16)
    w2, b2 = device.draw(width, hidden, dtype=BF16, scale=0.1), device.draw(width, dtype=BF16)
    scales = device.draw(width, dtype=BF16), device.draw(rows)
    y, mean, rstd = ops.layernorm_fwd(x, *norm, 1e-6, BF16)
    a, h = ops.linear_act(y, w1, b1, "gelu", save, "small")
    out = ops.linear_residual(a, w2, b2, x, *scales, "large")
    joined = ops.layernorm_linear_act(x, *norm, w1, b1, 1e-6, "gelu", save, "small")
    for part, whole in zip((a, h, mean, rstd), joined, strict=True):
        assert torch.equal(part, whole)
    joined = ops.layernorm_mlp_residual(x, *norm, w1, b1, w2, b2, *scales, 1e-6, "gelu", save, "small", "large")
    for part, whole in zip((out, h, mean, rstd), joined, strict=True):
        assert torch.equal(part, whole)


def autocast_linear_residual(x, weight, bias, residual, layer_scale, row_scale, tile):
    """As under autocast: the product is rounded to x's dtype before it is scaled and added."""
    branch = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    branch = branch if layer_scale is None else branch * layer_scale
    return (residual + (branch if row_scale is None else branch * row_scale[:, None])).to(residual.dtype)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_linear_act_grad(device, dtype, tile, act):
    for rows, cols, depth in shapes(device):
        dy, weight = device.draw(rows, depth, dtype=dtype), device.draw(depth, cols, dtype=dtype, scale=depth**-0.5)
        h = device.draw(rows, cols, dtype=dtype, scale=2.0)
        prove(device, "linear_act_grad", dy, weight, h, act, True, dtype, tile)
        prove(device, "linear_act_grad", dy, weight, h, act, False, None, tile)


def test_rows_of_a_larger_buffer(device):
    rows, cols, depth = 70, 72, 64

    def part(*size):
        return device.draw(*size, dtype=BF16, slices=True)

    x, weight, residual = part(rows, depth), part(cols, depth), part(rows, cols)
    prove(device, "linear_act", x, weight, None, "gelu", True, "large")
    prove(device, "linear_residual", x, weight, None, residual, None, None, "large")
    wide = device.draw(rows, cols, slices=True)
    prove(device, "linear_residual", x, weight, None, wide, None, None, "large", stock=autocast_linear_residual)
    for tile in ("large", "small"):
        prove(device, "linear_act_grad", x, part(depth, cols), part(rows, cols), "gelu", True, BF16, tile)
    single = device.draw(67, dtype=BF16).as_strided((1, depth), (67, 1))  # the stride of one row means nothing
    prove(device, "linear_act", single, weight, None, "gelu", True, "small")


@pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())
def test_column_sums_of_a_tile(tmp_path):
    """What the small tile's epilogue adds up, as a warpgroup holds it."""
    cuda_on_cpu.compile_program("column_sums.cpp", tmp_path / "sums", cuda_on_cpu.ROOT / "csrc")
    done = subprocess.run([tmp_path / "sums"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())
def test_column_sums_are_given_what_they_expect(tmp_path):
    """Values, their coordinates and the order of a warpgroup's subtiles, by CUTLASS's types for the small tile."""
    headers = cuda_on_cpu.cutlass_headers()
    if headers is None:
        pytest.skip("CUTLASS is not installed")
    cuda_on_cpu.compile_program(
        "epilogue_layout.cpp", tmp_path / "layout", cuda_on_cpu.ROOT / "csrc", headers, cuda=True
    )
    done = subprocess.run([tmp_path / "layout"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("tile", ["large", "small"])
def test_bias_gradient_of_outlier_channels(device, tile):
    """Partial sums of tiles, then their sum: float32 all the way, whatever the magnitude of a channel."""
    rows, cols, depth = 333, 264, 64
    dy, weight = device.draw(rows, depth, dtype=BF16), device.draw(depth, cols, dtype=BF16, scale=depth**-0.5)
    weight[:, ::7] *= 100
    h = device.draw(rows, cols, dtype=BF16)
    *_, sums = device.ops.linear_act_grad(dy, weight, h, "gelu", False, F32, tile)
    exact = cuda_passes.linear_act_grad(dy.double(), weight.double(), h.double(), "gelu", False, torch.float64)[2]
    assert ((sums.double() - exact).abs() <= 1e-4 * exact.abs() + 1e-3 * weight.abs().amax(0)).all()


def test_errors_name_tensor_rule_and_what_came(device):
    ops, x, weight = device.ops, device.draw(8, 64, dtype=BF16), device.draw(16, 64, dtype=BF16)

    def linear(x=x, weight=weight, bias=None, act="gelu", tile="large"):
        return ops.linear_act(x, weight, bias, act, False, tile)

    with pytest.raises(RuntimeError, match=r"linear_act: weight has shape \(16, 56\), expected \(16, 64\) like x"):
        linear(weight=weight[:, :56])
    with pytest.raises(RuntimeError, match="linear_act: x is float32, expected 16 bits"):
        linear(x=x.float())
    with pytest.raises(RuntimeError, match="linear_act: weight and x have two dtypes, expected one"):
        linear(weight=weight.to(F16))
    with pytest.raises(RuntimeError, match="x has 63 columns, expected a multiple of 8"):
        linear(x=x[:, :63], weight=weight[:, :63])
    with pytest.raises(RuntimeError, match="y has 15 columns, expected a multiple of 8"):
        linear(weight=weight[:15])
    with pytest.raises(RuntimeError, match="x is misaligned, expected rows that start at multiples of 16 bytes"):
        linear(x=x[:, 1:57], weight=weight[:, :56])
    with pytest.raises(RuntimeError, match="x has no columns, expected at least 8"):
        linear(x=x[:, :0], weight=weight[:, :0])
    with pytest.raises(RuntimeError, match="x has rows that overlap, expected a stride of 64 or more"):
        linear(x=x[:1].expand(8, 64))
    with pytest.raises(RuntimeError, match="act is 'relu', expected 'gelu', 'gelu_tanh' or 'quick_gelu'"):
        linear(act="relu")
    with pytest.raises(RuntimeError, match="tile is 'huge', expected 'large' or 'small'"):
        linear(tile="huge")
    with pytest.raises(RuntimeError, match=r"bias has shape \(8\), expected \(16\) like weight"):
        linear(bias=device.draw(8))
    with pytest.raises(RuntimeError, match=r"residual has shape \(8, 64\), expected \(8, 16\) like x and weight"):
        ops.linear_residual(x, weight, None, x, None, None, "small")
    with pytest.raises(RuntimeError, match="residual has 16 bits, expected float32 or the dtype of x"):
        ops.linear_residual(x, weight, None, device.draw(8, 16, dtype=F16), None, None, "small")
    with pytest.raises(RuntimeError, match="residual is misaligned, expected rows that start at multiples of 16 bytes"):
        ops.linear_residual(x, weight, None, device.draw(8, 18)[:, 1:17], None, None, "small")
    with pytest.raises(RuntimeError, match=r"h has shape \(8, 64\), expected \(8, 16\) like dy and weight"):
        ops.linear_act_grad(x, weight.t().contiguous(), x, "gelu", False, None, "large")


@pytest.mark.parametrize("op", list(_tiles.TILES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rule_chooses_what_is_compiled(op, dtype):
    for rows in (1, 64, 197, 1576, 50432, 1 << 30):
        for cols, depth in ((768, 768), (3072, 768), (768, 3072), (8, 8)):
            assert _tiles.choose(op, dtype, rows, cols, depth) in {tile.name for tile in _tiles.TILES[op]}


def test_the_rule_follows_the_waves():
    assert _tiles.choose("linear_act", "bfloat16", 197, 3072, 768) == "small"  # batch 1 must spread
    assert _tiles.choose("linear_residual", "bfloat16", 197, 768, 3072) == "small"
    assert _tiles.choose("linear_act", "bfloat16", 50000, 3072, 768) == "large"
    assert _tiles.choose("linear_residual", "bfloat16", 50000, 768, 3072) == "large"


def test_a_timed_tile_goes_before_the_rule(monkeypatch):
    key = ("linear_act", "bfloat16", 50000, 3072, 768)
    monkeypatch.setitem(_tiles.TIMED, key, "small")
    _tiles.choose.cache_clear()
    assert _tiles.choose(*key) == "small"
    _tiles.choose.cache_clear()


@pytest.mark.parametrize("op", list(_tiles.TILES))
def test_tiles_are_those_of_the_kernels(op):
    table = {"linear_act": "kLinearActTiles", "linear_residual": "kLinearResidualTiles"}[op]
    header = (Path(__file__).parent.parent / "csrc" / "cuda" / "sm90" / "gemm.h").read_text()
    sizes = re.findall(r"\{([\d, ]+)\}", re.search(table + r"\[\] = \{(.*)\};", header)[1])
    tiles = [f"{tile.rows}, {tile.cols}, {tile.cluster[0]}, {tile.cluster[1]}" for tile in _tiles.TILES[op]]
    assert sizes == tiles
    for name in _tiles.TIMED.values():
        assert name in {tile.name for tile in _tiles.TILES[op]}


@pytest.mark.parametrize("tile", ["large", "small"])
def test_many_rows(gpu, tile):
    """ViT-B/16 at batch 256, every row looked at: many waves of tiles, each with its own part of the sums."""
    rows, cols, depth = 50432, 3072, 768
    x, weight = (torch.randn(*size, dtype=BF16, device="cuda") for size in ((rows, depth), (cols, depth)))
    h = torch.randn(rows, cols, dtype=BF16, device="cuda")
    weight *= depth**-0.5
    back = weight.t().contiguous()
    y, pre = gpu.ops.linear_act(x, weight, None, "gelu", True, tile)
    dh, a, sums = gpu.ops.linear_act_grad(x, back, h, "gelu", True, F32, tile)
    residual = gpu.ops.linear_residual(a, back, None, x, None, None, tile)
    total = torch.zeros(cols, dtype=torch.float64, device="cuda")
    for part in torch.arange(rows, device="cuda").split(8192):
        wanted = cuda_passes.linear_act(x[part], weight, None, "gelu", True, tile)
        wanted += cuda_passes.linear_act_grad(x[part], back, h[part], "gelu", True, None)[:2]
        wanted += (cuda_passes.linear_residual(a[part], back, None, x[part], None, None, tile),)
        for got, expected in zip((y, pre, dh, a, residual), wanted, strict=True):
            torch.testing.assert_close(got[part], expected, rtol=2**-7, atol=2e-3)
        total += wanted[2].double().sum(0)
    assert (sums.double() - total).abs().max() < 1e-2 * total.abs().max()


def test_every_tile_gives_the_same_bits(gpu):
    """So that the choice of a tile, which depends on the number of rows, never shows in a result."""
    x, weight = gpu.draw(1000, 768, dtype=BF16), gpu.draw(3072, 768, dtype=BF16, scale=0.03)
    bias = gpu.draw(3072, dtype=BF16)
    large, small = (gpu.ops.linear_act(x, weight, bias, "gelu", True, tile) for tile in ("large", "small"))
    for got, wanted in zip(small, large, strict=True):
        assert torch.equal(got, wanted)
    dy, h, back = gpu.draw(1000, 768, dtype=BF16), gpu.draw(1000, 3072, dtype=BF16), weight.t().contiguous()
    large, small = (gpu.ops.linear_act_grad(dy, back, h, "gelu", True, None, tile) for tile in ("large", "small"))
    for got, wanted in zip(small, large, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_an_image_does_not_see_its_batch(gpu, dtype):
    import fastvit

    inputs = testing.make_inputs("layernorm_mlp", testing.VIT_SHAPES["base"], 64, dtype, "cuda")
    with fastvit.use_backend("cuda"), torch.no_grad():
        x = inputs.pop("x").detach()
        everything = fastvit.ops.layernorm_mlp(x, **inputs)
        for batch in (1, 2, 7, 64):
            assert torch.equal(fastvit.ops.layernorm_mlp(x[:batch], **inputs), everything[:batch]), batch


@pytest.mark.parametrize("tile", ["large", "small"])
def test_same_bits_every_time_on_any_stream(gpu, tile):
    dy, weight = gpu.draw(50432, 768, dtype=BF16), gpu.draw(768, 3072, dtype=BF16, scale=0.03)
    h = gpu.draw(50432, 3072, dtype=BF16)
    first = gpu.ops.linear_act_grad(dy, weight, h, "gelu", True, F32, tile)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = gpu.ops.linear_act_grad(dy, weight, h, "gelu", True, F32, tile)
        torch.cuda.current_stream().synchronize()
    for got, wanted in zip(again, first, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("rows", [3, 197, 2000])
def test_kernels_that_start_early_wait_for_what_they_read(gpu, rows):
    """Writers and readers of the same memory, activations and weights, back to back and with a pause after each."""
    x, norm = gpu.draw(rows, 768, dtype=BF16), (gpu.draw(768, dtype=BF16), gpu.draw(768, dtype=BF16))
    fc1, fc2 = gpu.draw(3072, 768, dtype=BF16, scale=0.03), gpu.draw(768, 3072, dtype=BF16, scale=0.02)

    def chain(pause):
        y, w1, w2, shift = x.clone(), fc1.clone(), fc2.clone(), norm[1].clone()
        for step in range(40):
            tile = ("large", "small")[step % 2]
            for tensor in (y, w1, w2, shift):
                tensor.mul_(1 - 0.01 * step)
            normed, _, _ = gpu.ops.layernorm_fwd(y, norm[0], shift, 1e-6, BF16)
            pause()
            h, _ = gpu.ops.linear_act(normed, w1, shift.repeat(4), "gelu", False, tile)
            pause()
            y = gpu.ops.linear_residual(h, w2, shift, y, None, None, tile)
            pause()
        return y

    assert torch.equal(chain(lambda: None), chain(torch.cuda.synchronize))


def test_captured_by_a_graph(gpu):
    x, weight = gpu.draw(197, 768, dtype=BF16), gpu.draw(3072, 768, dtype=BF16, scale=0.03)
    wanted, _ = gpu.ops.linear_act(x, weight, None, "gelu", False, "small")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = gpu.ops.linear_act(x, weight, None, "gelu", False, "small")
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_more_than_two_to_the_31_elements(gpu):
    rows, depth, cols = 700_016, 64, 3072
    x, weight = torch.randn(rows, depth, dtype=BF16, device="cuda"), gpu.draw(cols, depth, dtype=BF16)
    y, h = gpu.ops.linear_act(x, weight, None, "gelu", True, "large")
    last = gpu.ops.linear_act(x[-128:].clone(), weight, None, "gelu", True, "large")
    assert torch.equal(y[-128:], last[0])
    assert torch.equal(h[-128:], last[1])
