"""Where the CUDA tests run: on a GPU where there is one, and as fibers on the CPU (cuda_on_cpu.py)."""

import cuda_on_cpu
import cuda_passes
import pytest
import torch

from fastvit import _extension, testing

HAS_GPU = torch.cuda.is_available() and not _extension.why_not_cuda()
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU, or the CUDA library is not built")),
    pytest.param("cpu", marks=pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (residual stream, weights): one dtype, or float32 beside 16 bits under autocast
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]


class Device:
    """Where the kernels run, and random tensors there."""

    def __init__(self, name):
        self.name = name
        self.ops = torch.ops.fastvit_cuda if name == "cuda" else cuda_on_cpu.library()
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *size, dtype=torch.float32, scale=1.0, shift=0.0, slices=False):
        values = torch.randn(*size, generator=self.generator) * scale + shift
        values = values.to(self.name, dtype)
        return testing.sliced(values) if slices else values


def rows_for(device, width):
    """Numbers of rows to try: few where every thread is a fiber."""
    if device.name == "cuda":
        return [0, 1, 197, 50432]
    return [0, 1, 61] if width <= 192 else [5]


def prove(device, name, *arguments, mutated=(), stock=None):
    """Run the pass and its meaning; compare all results, those in ``mutated`` arguments too. Returns the results.

    ``stock`` computes what stock PyTorch would, where that rounds more often than the meaning.
    """

    def run(function, dtype=None):
        def convert(value):
            if isinstance(value, torch.dtype):
                return dtype or value
            return value.to(dtype or value.dtype, copy=True) if isinstance(value, torch.Tensor) else value

        given = [convert(value) for value in arguments] if function is not ours else list(arguments)
        results = function(*given)
        results = () if results is None else results if isinstance(results, tuple) else (results,)
        return [*results, *(given[i] for i in mutated)]

    ours = getattr(device.ops, name)
    meaning = getattr(cuda_passes, name)
    exact, eager = run(meaning, torch.float64), run(stock or meaning)
    results = run(ours)
    for i, (got, stock, wanted) in enumerate(zip(results, eager, exact, strict=True)):
        assert got.shape == stock.shape, f"{name} result {i}"
        assert got.dtype == stock.dtype or not got.numel(), f"{name} result {i}"
        if got.numel() >= 64:
            testing.assert_as_accurate(got, stock, wanted, f"{name} result {i}")
        elif got.numel():  # too few numbers for their errors to have a size
            bound = 2 * (stock.double() - wanted).abs().max() + 4 * torch.finfo(got.dtype).eps * wanted.abs().max()
            assert (got.double() - wanted).abs().max() <= bound, f"{name} result {i}"
    return results
