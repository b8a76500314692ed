"""What tests and benchmarks share: ViT's shapes, reproducible inputs and the accuracy gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference

__all__ = ["VIT_SHAPES", "Shape", "accuracy", "assert_as_accurate", "make_inputs", "sliced"]


@dataclass(frozen=True)
class Shape:
    """One encoder's sizes. ``tokens`` includes the class token."""

    embed_dim: int
    num_heads: int
    hidden_dim: int
    tokens: int
    patch_size: int = 16
    image_size: int = 224

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


VIT_SHAPES = {
    "tiny": Shape(192, 3, 768, 197),
    "small": Shape(384, 6, 1536, 197),
    "base": Shape(768, 12, 3072, 197),
    "large": Shape(1024, 16, 4096, 197),
    "huge14": Shape(1280, 16, 5120, 257, patch_size=14),
}


def make_inputs(op: str, shape: Shape, batch: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
    """Random arguments of ``fastvit.reference.<op>`` at a trained model's scales; weights ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(*size, generator=generator) * scale + shift
        return values.to(device=device, dtype=dtype).requires_grad_()

    dim, hidden, tokens = shape.embed_dim, shape.hidden_dim, shape.tokens
    norm = {"norm_weight": draw(dim, scale=0.2, shift=1.0), "norm_bias": draw(dim, scale=0.2)}
    if op == "patch_embed":
        side, patch = shape.image_size, shape.patch_size
        return {
            "images": draw(batch, 3, side, side),
            "weight": draw(dim, 3, patch, patch, scale=(3 * patch * patch) ** -0.5),
            "bias": draw(dim, scale=0.1),
            "pos_embed": draw((side // patch) ** 2 + 1, dim, scale=0.2),
            "prefix": draw(1, dim, scale=0.2),
        }
    if op == "attention":
        size = (batch, shape.num_heads, tokens, shape.head_dim)
        return {"q": draw(*size), "k": draw(*size), "v": draw(*size)}
    if op == "attention_packed":
        return {"qkv": draw(batch, tokens, 3 * dim), "num_heads": shape.num_heads}
    if op == "attention_varlen":  # every second sample is half as long
        lengths = torch.tensor([0] + [tokens if index % 2 == 0 else tokens // 2 for index in range(batch)])
        cu_seqlens = lengths.cumsum(0).to(device=device, dtype=torch.int32)
        rows = (int(cu_seqlens[-1]), shape.num_heads, shape.head_dim)
        return {"q": draw(*rows), "k": draw(*rows), "v": draw(*rows), "cu_seqlens": cu_seqlens, "max_seqlen": tokens}
    if op == "layernorm_linear":
        return {
            "x": draw(batch, tokens, dim),
            **norm,
            "weight": draw(3 * dim, dim, scale=dim**-0.5),
            "bias": draw(3 * dim, scale=0.1),
        }
    if op == "linear_residual":
        return {
            "x": draw(batch, tokens, dim),
            "weight": draw(dim, dim, scale=dim**-0.5),
            "bias": draw(dim, scale=0.1),
            "residual": draw(batch, tokens, dim),
            "layer_scale": draw(dim, scale=0.2, shift=0.5),
        }
    if op == "layernorm_mlp":
        return {
            "x": draw(batch, tokens, dim),
            **norm,
            "fc1_weight": draw(hidden, dim, scale=dim**-0.5),
            "fc1_bias": draw(hidden, scale=0.1),
            "fc2_weight": draw(dim, hidden, scale=hidden**-0.5),
            "fc2_bias": draw(dim, scale=0.1),
            "layer_scale": draw(dim, scale=0.2, shift=0.5),
        }
    raise ValueError(f"make_inputs: op is {op!r}, expected a function of fastvit.reference")


def sliced(tensor: Tensor) -> Tensor:
    """The same values as a view into a larger buffer: real strides, and NaN wherever a kernel must not read."""
    padded = torch.full([size + 3 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 8], float("nan"))
    view = padded.to(tensor)[tuple(slice(1, 1 + size) for size in tensor.shape[:-1])][..., : tensor.shape[-1]]
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class Accuracy:
    """Errors of ``fused`` and ``eager`` against ``exact``, and whether ``fused`` passes both gates."""

    max_error: float
    max_error_eager: float
    max_limit: float
    rms_error: float
    rms_error_eager: float
    rms_limit: float

    @property
    def passed(self) -> bool:
        return self.max_error <= self.max_limit and self.rms_error <= self.rms_limit


@dataclass(frozen=True)
class Errors:
    """Distance of a result from the exact one."""

    max: float
    rms: float


def errors(value: Tensor, exact: Tensor) -> Errors:
    """Errors of ``value`` against ``exact`` (float64, same shape). A NaN in either shows as NaN."""
    if value.shape != exact.shape:
        raise AssertionError(f"shapes differ: value {value.shape}, exact {exact.shape}")
    if value.numel() == 0:
        return Errors(0.0, 0.0)
    difference = value.detach().to(exact.device).double() - exact.detach().double()
    return Errors(difference.abs().max().item(), difference.square().mean().sqrt().item())


def judge(fused: Errors, eager: Errors, exact: Tensor, dtype: torch.dtype, factor: float = 2.0) -> Accuracy:
    """Hold the errors of ``fused`` to those of ``eager``, both computed in ``dtype``, in the maximum and in the rms."""
    size, unit = errors(torch.zeros_like(exact), exact), torch.finfo(dtype).eps
    max_limit = factor * eager.max + unit * size.max
    return Accuracy(fused.max, eager.max, max_limit, fused.rms, eager.rms, factor * eager.rms + 0.01 * unit * size.rms)


def accuracy(fused: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0) -> Accuracy:
    """Measure ``fused`` and ``eager`` (one dtype) against ``exact`` (float64). NaN anywhere fails both gates."""
    return judge(errors(fused, exact), errors(eager, exact), exact, fused.dtype, factor)


def assert_as_accurate(fused: Tensor, eager: Tensor, exact: Tensor, name: str = "output", factor: float = 2.0) -> None:
    """Fail unless ``fused`` is about as accurate as ``eager``, in the maximum and in the root mean square."""
    result = accuracy(fused, eager, exact, factor)
    assert result.passed, (
        f"{name}: max error {result.max_error:.3e} (limit {result.max_limit:.3e}, stock {result.max_error_eager:.3e}), "
        f"rms error {result.rms_error:.3e} (limit {result.rms_limit:.3e}, stock {result.rms_error_eager:.3e})"
    )


def run_with_gradients(fn: Callable[..., Tensor], inputs: dict, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """Call ``fn(**inputs)``; return the output and a gradient for every input that asks for one."""
    output = fn(**inputs)
    wanted = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    grad_output = torch.ones_like(output) if grad_output is None else grad_output.to(output)
    grads = torch.autograd.grad(output, [inputs[name] for name in wanted], grad_output)
    return {"output": output.detach(), **{f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def cast_inputs(inputs: dict, dtype: torch.dtype, skip: Iterable[str] = ()) -> dict:
    """The same inputs in another dtype, detached from the originals; integer tensors and plain values stay."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in skip
        else value
        for name, value in inputs.items()
    }


def assert_op_as_accurate(op: str, fused: Callable[..., Tensor], inputs: dict, factor: float = 2.0) -> None:
    """Compare ``fused`` with ``fastvit.reference.<op>``: the output and the gradient of every input, both gates."""
    meaning = getattr(reference, op)
    exact_inputs = cast_inputs(inputs, torch.float64)
    with torch.no_grad():
        shape = meaning(**inputs).shape
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad_output = grad_output.to(next(v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad))
    device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
    grad_output = grad_output.to(device)
    exact = run_with_gradients(meaning, exact_inputs, grad_output)
    eager = run_with_gradients(meaning, inputs, grad_output)
    ours = run_with_gradients(fused, inputs, grad_output)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert_as_accurate(value, eager[name], exact[name], f"{op} {name}", factor)
