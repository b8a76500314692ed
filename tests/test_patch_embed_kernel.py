"""The Triton patch embedding, forward and backward, against float64. Needs CUDA or the interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.testing import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip("fastvit.kernels.patch_embed")

runs = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels run on CUDA, or anywhere with TRITON_INTERPRET=1"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """What a kernel leaves unwritten, or reads before it is written, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Arguments of one call; ``grid`` is in patches, ``pos`` is "all", "patches" or "none"."""

    dtype: torch.dtype = torch.float32
    patch: tuple[int, int] = (16, 16)
    grid: tuple[int, int] = (3, 2)
    batch: int = 3
    channels: int = 3
    dim: int = 72
    pixels: torch.dtype | None = None  # None: dtype
    layout: str = "nchw"
    bias: bool = True
    prefix: int = 1
    pos: str = "all"
    mean: bool = False
    std: bool = False

    def __str__(self) -> str:
        shown = [
            str(value).removeprefix("torch.") if value is not True else name
            for name, value in vars(self).items()
            if value != type(self).__dataclass_fields__[name].default
        ]
        return "-".join(shown) or "default"

    def arguments(self) -> dict[str, Tensor | None]:
        (patch_h, patch_w), (rows, cols) = self.patch, self.grid

        def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*size) * scale).to(device=DEVICE, dtype=dtype)

        size = (self.batch, self.channels, rows * patch_h, cols * patch_w)
        if self.pixels == torch.uint8:
            images = torch.randint(0, 256, size, dtype=torch.uint8).to(DEVICE)
        else:
            images = draw(*size, dtype=self.pixels or self.dtype)
        tokens = rows * cols + (self.prefix if self.pos == "all" else 0)
        scale = (self.channels * patch_h * patch_w) ** -0.5
        channel = torch.arange(self.channels, device=DEVICE, dtype=torch.float32)
        return {
            "images": laid_out(images, self.layout),
            "weight": draw(self.dim, self.channels, patch_h, patch_w, scale=scale),
            "bias": draw(self.dim, scale=0.1) if self.bias else None,
            "pos_embed": draw(tokens, self.dim, scale=0.2) if self.pos != "none" else None,
            "prefix": draw(self.prefix, self.dim, scale=0.2) if self.prefix else None,
            "mean": 0.4 + 0.03 * channel if self.mean else None,
            "std": 0.2 + 0.01 * channel if self.std else None,
        }


def laid_out(images: Tensor, layout: str) -> Tensor:
    """The same pixels in other strides."""
    if layout == "nchw":
        return images
    if layout == "nhwc":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    batch, channels, height, width = images.shape
    fill = 255 if images.dtype == torch.uint8 else float("nan")
    if layout == "sliced":
        view = images.new_full((batch + 1, channels + 1, height + 2, width + 5), fill)[1:, 1:, 1:-1, 3:-2]
    else:  # channels last with a spare channel: pixels of a row are not dense
        assert layout == "nhwc_sliced"
        view = images.new_full((batch, height + 2, width + 5, channels + 1), fill)[:, 1:-1, 3:-2, 1:].permute(
            0, 3, 1, 2
        )
    return view.copy_(images)


def stock(arguments: dict, dtype: torch.dtype) -> dict:
    """What stock PyTorch is given: pixels normalised in float32 (or more) by the data loader, then cast."""
    given = {name: value if value is None else value.to(dtype) for name, value in arguments.items()}
    wide = torch.promote_types(dtype, torch.float32)
    pixels = reference.normalize_pixels(arguments["images"], arguments["mean"], arguments["std"], wide)
    return given | {"images": pixels.to(dtype), "mean": None, "std": None}


def gradients(arguments: dict, dout: Tensor) -> dict[str, Tensor]:
    inputs = {name: value.detach().requires_grad_() for name, value in arguments.items() if value is not None}
    tokens = reference.patch_embed(**{**arguments, **inputs})
    return dict(zip(inputs, torch.autograd.grad(tokens, list(inputs.values()), dout.to(tokens)), strict=True))


def forward(arguments: dict, **kwargs) -> Tensor:
    order = ("images", "weight", "bias", "pos_embed", "prefix", "mean", "std")
    return kernels.patch_embed_fwd(*(arguments[name] for name in order), **kwargs)


def backward(arguments: dict, dout: Tensor) -> dict[str, Tensor]:
    """Every gradient there is, composed of the kernels' three results."""
    prefix, pos_embed = arguments["prefix"], arguments["pos_embed"]
    num_prefix = 0 if prefix is None else prefix.shape[0]
    mask = (arguments["images"].is_floating_point(), True, True)
    dimages, dweight, token_sum = kernels.patch_embed_bwd(
        dout, arguments["images"], arguments["weight"], num_prefix, arguments["mean"], arguments["std"], mask
    )
    dtype = arguments["weight"].dtype
    pos_rows = 0 if pos_embed is None else num_prefix + token_sum.shape[0] - num_prefix - pos_embed.shape[0]
    found = {
        "images": dimages,
        "weight": dweight,
        "bias": token_sum[num_prefix:].sum(0).to(dtype),
        "pos_embed": token_sum[pos_rows:].to(dtype),
        "prefix": token_sum[:num_prefix].to(dtype),
    }
    return {name: grad for name, grad in found.items() if arguments[name] is not None and grad is not None}


def check(case: Case) -> None:
    arguments = case.arguments()
    exact_arguments = stock(arguments, torch.float64)
    eager_arguments = stock(arguments, case.dtype)
    exact = reference.patch_embed(**exact_arguments)
    tokens = forward(arguments)
    assert tokens.is_contiguous()
    assert tokens.dtype == case.dtype
    assert_as_accurate(tokens, reference.patch_embed(**eager_arguments), exact, "tokens")

    dout = torch.randn_like(tokens)
    ours, eager = backward(arguments, dout), gradients(eager_arguments, dout)
    exact_grads = gradients(exact_arguments, dout)
    assert ours.keys() == exact_grads.keys() - (set() if arguments["images"].is_floating_point() else {"images"})
    for name, grad in ours.items():
        eager_grad, exact_grad = eager[name], exact_grads[name]
        if name == "images" and case.std:  # to the pixels as they were given
            eager_grad = eager_grad / arguments["std"].view(-1, 1, 1).to(eager_grad)
            exact_grad = exact_grad / arguments["std"].view(-1, 1, 1).double()
        assert grad.dtype == arguments[name].dtype
        assert_as_accurate(grad, eager_grad, exact_grad, f"grad_{name}")


BF16, F16, F32, U8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
CASES = [
    *(Case(dtype) for dtype in (F32, BF16, F16)),
    *(Case(BF16, patch=(side, side), dim=40) for side in (8, 14, 32)),
    *(Case(F32, patch=(6, 10), channels=channels) for channels in (1, 3, 4)),
    Case(BF16, patch=(6, 10), channels=1, layout="nhwc"),
    Case(BF16, channels=4, layout="nhwc", grid=(2, 3)),
    *(Case(BF16, patch=(14, 14), layout=layout) for layout in ("nhwc", "sliced", "nhwc_sliced", "transposed")),
    *(Case(F32, layout=layout) for layout in ("nhwc", "sliced", "nhwc_sliced")),
    *(Case(BF16, pixels=U8, layout=layout, mean=True, std=True) for layout in ("nchw", "nhwc", "nhwc_sliced")),
    *(Case(F32, pixels=U8, patch=side, mean=True, std=True) for side in ((16, 16), (14, 14))),
    Case(BF16, pixels=U8, patch=(14, 14), channels=4, mean=True),
    Case(F16, pixels=U8, patch=(32, 32), channels=1, std=True),
    Case(F16, pixels=U8, patch=(8, 8)),
    Case(BF16, pixels=F32, mean=True, std=True),
    Case(BF16, pixels=F32, patch=(14, 14), layout="nhwc"),
    Case(F32, mean=True, std=True, layout="sliced"),
    Case(BF16, bias=False, prefix=0, pos="none"),
    Case(BF16, bias=False, prefix=0, pos="all"),
    Case(F32, prefix=5, pos="all", batch=5),
    Case(BF16, (8, 8), prefix=5, pos="patches", dim=192),
    Case(F32, prefix=5, pos="none"),
    Case(BF16, grid=(1, 1), batch=1, dim=40),
    Case(BF16, grid=(1, 1), batch=70, patch=(8, 8), prefix=2, dim=64),
    Case(F32, grid=(14, 14), batch=1, patch=(8, 8), dim=64),
]


@runs
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case):
    check(case)


@runs
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_parity_of_large_tiles_and_splits(monkeypatch, dtype, arch):
    """Two processors are filled by the largest tiles; rows of an image and of a split end at different places."""
    monkeypatch.setattr(kernels, "limits", lambda device: kernels.Limits(arch, 2, 160 * 1024))
    monkeypatch.setattr(kernels, "_MIN_ROWS_PER_SPLIT", 32)
    monkeypatch.setattr(kernels, "_MAX_ROWS_PER_SPLIT", 96)
    check(Case(dtype, grid=(7, 5), batch=11, dim=264, patch=(8, 8), prefix=2))


@runs
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_autocast_keeps_float32_tokens(layout):
    """float32 images, tables and gradients around a bfloat16 weight: no rounding but that of the products."""
    case = Case(BF16, pixels=F32, layout=layout, prefix=2)
    arguments = case.arguments()
    for name in ("bias", "pos_embed", "prefix"):
        arguments[name] = torch.randn_like(arguments[name], dtype=F32)
    exact_arguments = stock(arguments, torch.float64)
    exact = reference.patch_embed(**exact_arguments)
    halved = stock(arguments, BF16)
    patches = reference.patch_embed(halved["images"], halved["weight"], halved["bias"])
    tokens = forward(arguments, dtype=F32)
    eager = torch.cat([arguments["prefix"].expand(case.batch, -1, -1), patches.float()], 1) + arguments["pos_embed"]
    assert tokens.dtype == F32
    assert_as_accurate(tokens.to(BF16), eager.to(BF16), exact, "tokens")
    assert (tokens[:, :2] == eager[:, :2]).all(), "prefix rows are exact"

    dout = torch.randn_like(tokens)
    ours, exact_grads = backward(arguments, dout), gradients(exact_arguments, dout)
    eager_grads = gradients(halved, dout)
    assert_as_accurate(ours["weight"], eager_grads["weight"], exact_grads["weight"], "grad_weight")
    assert_as_accurate(ours["images"].to(BF16), eager_grads["images"], exact_grads["images"], "grad_images")
    assert ours["images"].dtype == F32


@runs
def test_large_magnitude():
    case = Case(BF16)
    arguments = case.arguments()
    arguments["images"] *= 1e4
    exact = reference.patch_embed(**stock(arguments, torch.float64))
    assert_as_accurate(forward(arguments), reference.patch_embed(**stock(arguments, BF16)), exact)


@runs
def test_channels_last_weight():
    """A model in channels_last memory format: gradients take the strides of what they belong to."""
    arguments = Case(F32, (8, 8), layout="nhwc").arguments()
    plain = forward(arguments)
    dout = torch.randn_like(plain)
    expected = backward(arguments, dout)
    arguments["weight"] = arguments["weight"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(forward(arguments), plain)
    found = backward(arguments, dout)
    assert torch.equal(found["weight"], expected["weight"])
    assert found["weight"].stride() == arguments["weight"].stride()
    assert found["images"].stride() == arguments["images"].stride()


@runs
def test_gradient_of_a_strided_output():
    arguments = Case(F32, (8, 8)).arguments()
    dout = torch.randn_like(forward(arguments))
    expected = backward(arguments, dout)
    strided = dout.transpose(0, 2).contiguous().transpose(0, 2)
    for name, grad in backward(arguments, strided).items():
        assert torch.equal(grad, expected[name]), name


@runs
def test_mask_and_repeatability():
    arguments = Case(BF16, (8, 8)).arguments()
    dout = torch.randn_like(forward(arguments))
    fixed = (dout, arguments["images"], arguments["weight"], 1, None, None)
    every = kernels.patch_embed_bwd(*fixed, (True, True, True))
    for wanted in range(3):
        some = kernels.patch_embed_bwd(*fixed, tuple(i == wanted for i in range(3)))
        assert [grad is not None for grad in some] == [i == wanted for i in range(3)]
        assert torch.equal(some[wanted], every[wanted])


@runs
def test_empty_batch():
    arguments = Case(BF16, batch=0).arguments()
    tokens = forward(arguments)
    assert tokens.shape == (0, 7, 72)
    dimages, dweight, token_sum = kernels.patch_embed_bwd(
        tokens, arguments["images"], arguments["weight"], 1, None, None, (True, True, True)
    )
    assert dimages.shape == arguments["images"].shape
    assert torch.equal(dweight, torch.zeros_like(arguments["weight"]))
    assert torch.equal(token_sum, torch.zeros(7, 72, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA: full sizes")
@pytest.mark.parametrize("pixels", [BF16, F32, U8], ids=str)
@pytest.mark.parametrize(("side", "patch"), [(224, 16), (224, 32), (518, 14)])
def test_parity_at_full_size(side, patch, pixels):
    normalised = pixels == U8
    grid = (side // patch, side // patch)
    check(Case(BF16, (patch, patch), grid, 33, dim=768, pixels=pixels, mean=normalised, std=normalised))


def some_aot_cases(arch: int) -> list:
    names = ("fwd_large_uint8", "dweight_large", "dimages_large")
    cases = [case for case in kernels.aot_cases(arch) if case.name.startswith(tuple(f"patch_embed_{n}" for n in names))]
    return [case for case in cases if case.name.endswith(("bfloat16", "_float32")) and "autocast" not in case.name]


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_matrix_units(arch):
    """16-bit products use the tensor cores of the architecture; float32 products never become TF32."""
    for case in some_aot_cases(arch):
        compiled = case.compile(arch)
        half = case.name.endswith("bfloat16")
        unit = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
        assert (unit in compiled.asm["ptx"]) == half, case.name
        assert "tf32" not in compiled.asm["ptx"], case.name
        assert compiled.metadata.shared <= kernels.Limits.of_arch(arch).shared, case.name
