"""The patch embedding on the CPU against the reference: pixels of every kind, every table, all gradients."""

import cpp_ops
import pytest
import torch

from fastvit import ops, reference
from fastvit.dispatch import Unsupported, use_backend
from fastvit.testing import assert_as_accurate, assert_op_as_accurate, cast_inputs, run_with_gradients, sliced

C = cpp_ops.C

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def patch_embed(**inputs):
    cpp_ops.poison()
    with use_backend("cpp"):
        return ops.patch_embed(**inputs)


def make(patch=(16, 16), grid=(3, 2), batch=2, channels=3, dim=72, prefix=1, pos="all", dtype=FP32):
    def draw(*size, scale=1.0):
        return (torch.randn(*size) * scale).to(dtype).requires_grad_()

    (height, width), (rows, columns) = patch, grid
    tokens = {"all": rows * columns + prefix, "patches": rows * columns}.get(pos)
    return {
        "images": draw(batch, channels, rows * height, columns * width),
        "weight": draw(dim, channels, height, width, scale=(channels * height * width) ** -0.5),
        "bias": draw(dim, scale=0.1),
        "pos_embed": draw(tokens, dim, scale=0.2) if tokens else None,
        "prefix": draw(prefix, dim, scale=0.2) if prefix else None,
    }


def check(inputs, **options):
    assert_op_as_accurate("patch_embed", patch_embed, {**inputs, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [(8, 8), (14, 14), (16, 16), (32, 32), (16, 8), (3, 5), (1, 1)], ids=str)
def test_patches(patch, dtype):
    check(make(patch, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_channels(channels, dtype):
    check(make((4, 6), channels=channels, dtype=dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("pos", ["all", "patches", "none"])
def test_tables(pos, prefix, dtype):
    check(make((8, 8), prefix=prefix, pos=pos, dtype=dtype))


def test_without_bias():
    check(make((8, 8)) | {"bias": None})


@pytest.mark.parametrize(("batch", "grid"), [(1, (1, 1)), (1, (14, 14)), (3, (7, 9))], ids=str)
def test_grids(batch, grid):
    check(make((8, 8), grid=grid, batch=batch, dim=65))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_floats(dtype):
    inputs = make((8, 8), dtype=dtype)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    exact = run_with_gradients(reference.patch_embed, cast_inputs(inputs | {"mean": mean, "std": std}, torch.float64))
    ours = run_with_gradients(patch_embed, inputs | {"mean": mean, "std": std})
    with use_backend("torch"):
        eager = run_with_gradients(ops.patch_embed, inputs | {"mean": mean, "std": std})
    for name, value in ours.items():
        assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(dtype, normalise, layout):
    inputs = make((14, 14), dtype=dtype)
    inputs["images"] = torch.randint(0, 256, inputs["images"].shape, dtype=torch.uint8).to(memory_format=layout)
    if normalise:
        inputs |= {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    exact = run_with_gradients(reference.patch_embed, cast_inputs(inputs, torch.float64))
    ours = run_with_gradients(patch_embed, inputs)
    with use_backend("torch"):
        eager = run_with_gradients(ops.patch_embed, inputs)
    for name, value in ours.items():
        assert_as_accurate(value, eager[name], exact[name], name)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_layouts(dtype):
    inputs = make((4, 6), dtype=dtype)
    plain = run_with_gradients(patch_embed, inputs)
    views = {
        "channels_last": {n: inputs[n].detach().to(memory_format=torch.channels_last) for n in ("images", "weight")},
        "sliced": {n: sliced(v.detach()) for n, v in inputs.items()},
        "turned": {"images": inputs["images"].detach().transpose(2, 3).contiguous().transpose(2, 3)},
        "transposed tables": {n: inputs[n].detach().t().contiguous().t() for n in ("pos_embed", "prefix")},
    }
    for name, changed in views.items():
        some = inputs | {n: v.requires_grad_() for n, v in changed.items()}
        for result, value in run_with_gradients(patch_embed, some).items():
            assert torch.equal(value, plain[result]), f"{name}: {result}"


def test_float32_images_with_half_weights():
    inputs = make((8, 8), dtype=BF16)
    inputs["images"] = inputs["images"].detach().float().requires_grad_()
    results = run_with_gradients(patch_embed, inputs)
    assert results["output"].dtype == BF16
    assert results["grad_images"].dtype == FP32


def test_one_image_for_the_whole_batch():
    inputs = make((8, 8), batch=1)
    images = inputs["images"].detach().expand(3, -1, -1, -1)
    out = patch_embed(**(inputs | {"images": images}))
    assert torch.equal(out[2], patch_embed(**inputs)[0])


def test_no_images():
    inputs = make((8, 8), batch=0)
    results = run_with_gradients(patch_embed, inputs)
    assert results["output"].shape == (0, 7, 72)
    for name, value in results.items():
        assert not value.any(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_patch(bad):
    inputs = {name: value.detach() for name, value in make((8, 8)).items()}
    clean = patch_embed(**inputs)
    inputs["images"][1, 2, 9, 3] = bad  # second row of patches, first column
    out = patch_embed(**inputs)
    touched = torch.zeros(2, 7, dtype=torch.bool)
    touched[1, 1 + 2] = True
    assert not out[touched].isfinite().any()
    assert torch.equal(out[~touched], clean[~touched])


def test_bits_do_not_depend_on_threads_or_batch():
    inputs = make((8, 8), grid=(7, 9), batch=3)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(run_with_gradients(patch_embed, inputs))
        finally:
            torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
    alone = patch_embed(**(inputs | {"images": inputs["images"][1:2]}))
    assert torch.equal(alone[0], results[0]["output"][1])


def test_pack_is_kept_and_never_stale():
    C.clear_pack_cache()
    inputs = {name: value.detach() for name, value in make((8, 8)).items()}
    patch_embed(**inputs)
    patch_embed(**inputs)
    assert C.pack_cache_info()["entries"] == 1
    inputs["weight"][5, 1, 2, 3] += 100  # counted as a version; no sample of values need see it
    out, expected = patch_embed(**inputs), reference.patch_embed(**inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    C.clear_pack_cache()


def test_refusals():
    inputs = make((8, 8))
    with pytest.raises(Unsupported, match="mean or std requires a gradient, cpp gives none"):
        patch_embed(**inputs, mean=torch.zeros(3, requires_grad=True))
    with pytest.raises(Unsupported, match=r"weight is torch.float64, the kernels take float32"):
        patch_embed(**{name: value.double() for name, value in inputs.items()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.zeros(3, 16, 16)}, r"images has shape \(3, 16, 16\), expected \(B, C, IH, IW\)"),
        ({"images": torch.zeros(1, 3, 15, 16)}, "images are 15 x 16 pixels, expected multiples of the patch, 8 x 8"),
        ({"images": torch.zeros(1, 3, 16, 16).long()}, "images has dtype Long, expected float32, bfloat16 or float16"),
        ({"weight": torch.zeros(4, 2, 8, 8)}, r"weight has shape \(4, 2, 8, 8\), expected \(E, 3, PH, PW\)"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), expected \(4,\)"),
        ({"pos_embed": torch.zeros(7, 4)}, r"pos_embed has shape \(7, 4\), expected \(5, 4\) for the tokens"),
        ({"prefix": torch.zeros(1, 3)}, r"prefix has shape \(1, 3\), expected \(1, 4\)"),
        ({"mean": torch.zeros(1)}, r"mean has shape \(1,\), expected \(3,\) like the channels"),
    ],
)
def test_errors(changed, message):
    arguments = {
        "images": torch.zeros(1, 3, 16, 16),
        "weight": torch.zeros(4, 3, 8, 8),
        "bias": torch.zeros(4),
        "pos_embed": torch.zeros(5, 4),
        "prefix": torch.zeros(1, 4),
        "mean": None,
        "std": None,
    }
    with pytest.raises(ValueError, match=message):
        C.patch_embed_fwd(*(arguments | changed).values(), False)


def test_no_gradient_of_bytes():
    images, weight = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 8, 8)
    with pytest.raises(ValueError, match="images is uint8, which has no gradient"):
        C.patch_embed_bwd(torch.zeros(1, 1, 4), images, weight, 0, None, None, [True, False, False])
