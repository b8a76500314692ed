"""One whole model at one batch size: inference, or a training step with its optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accelerate import accelerate
from ..dispatch import recording
from ..model import create_model
from ..testing import Shape
from . import runtimes, stock
from .accuracy import check, sample
from .costs import Cost, model_flops
from .providers import PROVIDERS, Missing, Provider, Refused, best_attention, capture, compile_options, running
from .timing import Candidate

CHECKED_IMAGES = 2


class ModelCase:
    """A plain ViT by fastvit and in stock PyTorch, with the same weights. ``mode`` is "infer" or "train".

    A model without a head is trained on its features as if they were logits.
    """

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: torch.device, mode: str):
        self.name, self.dtype, self.device, self.mode = name, dtype, device, mode
        generator = torch.Generator().manual_seed(0)
        model = create_model(name)
        if reasons := stock.why_not_plain(model):
            raise ValueError(f"bench: {name} is not one of the plain ViTs that are timed: {'; '.join(reasons)}")
        shape, depth = _sizes(model)
        self.weights = {key: _trained_scale(key, value, generator) for key, value in model.state_dict().items()}
        self.cost = Cost(model_flops(shape, depth, batch, mode, model.num_classes), 0.0)
        side = shape.image_size
        self.images = torch.randn(batch, 3, side, side, generator=generator).to(device, dtype)
        self.labels = torch.randint(model.num_classes or shape.embed_dim, (batch,), generator=generator).to(device)

    def candidate(self, name: str) -> Candidate:
        """The provider, checked and ready to time; raises ``Refused``."""
        provider = PROVIDERS[name]
        if provider.graph and (self.device.type != "cuda" or self.mode != "infer"):
            raise Refused("a CUDA graph is replayed for infer on a GPU only")
        if provider.memory != "default" and self.mode != "train":
            raise Refused(f"{name} differs in what it keeps for a backward: for train only")
        if provider.autocast and self.dtype == torch.float32:
            raise Refused("autocast needs a 16-bit dtype")
        if provider.runtime:
            return self._foreign(name, provider.runtime)
        context = functools.partial(running, provider, "auto", self.device, self.dtype)
        model = self._model(provider)
        with context(), recording() as calls:
            error = self._check(model, provider)
        backends = sorted({backend for _, backend in calls}) or ["torch"]
        notes = {"backend": "+".join(backends), "error": error}
        if provider.compiled:
            model.compile(**compile_options(self.device, whole_model=True, training=self.mode == "train"))
        step = self._step(model, provider)
        if provider.graph:
            with context():
                return Candidate(name, capture(lambda: step(None))[0], notes=notes)
        return Candidate(name, step, context=context, notes=notes)

    def _foreign(self, name: str, runtime: str) -> Candidate:
        """Another runtime on the same weights, given in float32 but rounded to the dtype."""
        if self.device.type != "cpu" or self.mode != "infer":
            raise Missing(f"{runtime} is compared for infer on a CPU only")
        model, images = self._model(PROVIDERS["eager"]).float().eval(), self.images.float()
        run = runtimes.compile_model(runtime, model, images, self.dtype)
        logits = run(images)[:CHECKED_IMAGES].to(self.dtype)
        error = check(sample({"logits": logits}), self._eager, self._exact)
        return Candidate(name, lambda _: run(images), notes={"backend": runtime, "error": error})

    def _model(self, provider: Provider) -> nn.Module:
        model = create_model(self.name) if provider.ours else self._stock()
        model.load_state_dict(self.weights)
        if provider.memory != "default":
            accelerate(model, memory=provider.memory)
        model = model.to(self.device, torch.float32 if provider.autocast else self.dtype)
        return model.train(self.mode == "train").requires_grad_(self.mode == "train")

    def _stock(self) -> nn.Module:
        with torch.device("meta"):
            like = create_model(self.name)
        return stock.VisionTransformer(like)

    def _step(self, model: nn.Module, provider: Provider) -> Callable[[Any], Any]:
        images = self.images.float() if provider.autocast else self.images
        if self.mode == "infer":
            return torch.no_grad()(lambda _: model(images))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.device.type == "cuda")

        def train(_: Any) -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images).float(), self.labels).backward()
            optimizer.step()

        return train

    def _check(self, model: nn.Module, provider: Provider) -> float:
        """The error of the logits, and in training of all gradients as one vector, on a few of the timed images."""
        with best_attention(self.device, self.dtype):
            eager = self._eager
        images = self.images[:CHECKED_IMAGES]
        results = self._results(model, images.float() if provider.autocast else images)
        return check(results, eager, self._exact)

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        return self._stock_results(torch.float64)

    @functools.cached_property
    def _eager(self) -> dict[str, Tensor]:
        return self._stock_results(self.dtype)

    def _stock_results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        model = self._model(PROVIDERS["eager"]).to(dtype)
        results = self._results(model, self.images[:CHECKED_IMAGES].to(dtype))
        return {name: value.to(dtype) for name, value in results.items()}

    def _results(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        dtype = self.dtype if images.dtype != torch.float64 else torch.float64
        if self.mode == "infer":
            with torch.no_grad():
                return sample({"logits": model(images).to(dtype)})
        logits = model(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), self.labels[: len(images)])
        parameters = dict(sorted(model.named_parameters()))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        flat = torch.cat([gradient.flatten().to(dtype) for gradient in gradients])
        return sample({"logits": logits.detach().to(dtype), "gradients": flat})


def _sizes(model: Any) -> tuple[Shape, int]:
    """(shape, depth) of a plain ViT."""
    block, side = model.blocks[0], model.patch_embed.img_size[0]
    shape = Shape(
        embed_dim=model.embed_dim,
        num_heads=block.attn.num_heads,
        hidden_dim=block.mlp.fc1.out_features,
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        patch_size=model.patch_embed.patch_size[0],
        image_size=side,
    )
    return shape, len(model.blocks)


def _trained_scale(key: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Random values in place of a fresh model's zeros and constants, which would hide mistakes."""
    if key.endswith("weight") and value.dim() > 1:
        return torch.randn(value.shape, generator=generator) * (value[0].numel() ** -0.5)
    is_norm = "norm" in key and key.endswith("weight")
    return torch.randn(value.shape, generator=generator) * (0.1 if is_norm or key.endswith("bias") else 0.2) + is_norm
