"""A part of the parity certificate on the device: an op at ViT's sizes, or a whole model. Run by benchmarks/gpu.py.

python benchmarks/gpu_parity.py OUT attention/bfloat16 [--rehearse]
python benchmarks/gpu_parity.py OUT attention=cuda/bfloat16       the backend that "auto" passes by
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastvit.dispatch import use_backend
from fastvit.model import create_model
from fastvit.ops import _sm90
from fastvit.parity import model_rows, op_rows
from fastvit.testing import VIT_SHAPES

OPS = (
    "patch_embed",
    "attention",
    "attention_packed",
    "attention_varlen",
    "layernorm_linear",
    "linear_residual",
    "layernorm_mlp",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BY_NAME = ("attention=cuda", "attention_packed=cuda")  # an op and a backend that "auto" passes by


MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")


def parts(rehearse: bool) -> list[str]:
    """What can be measured side by side: an op or a model, and a dtype."""
    if rehearse:
        return [f"{name}/bfloat16" for name in (*OPS, "vit_tiny_patch16_224")]
    models = [f"{name}/{dtype}" for name in MODELS for dtype in ("bfloat16", "float32")]
    named = BY_NAME if torch.cuda.is_available() and not _sm90.why_not_built() else ()
    short = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    return [
        *models,
        *(f"{op}/{short[dtype]}" for op in OPS for dtype in DTYPES),
        *(f"{name}/{short[dtype]}" for name in named for dtype in (torch.bfloat16, torch.float16)),
    ]


def measure(part: str, rehearse: bool) -> list[dict]:
    name, dtype = part.split("/")[0], getattr(torch, part.split("/")[1])
    device = "cpu" if rehearse else "cuda"
    if name in BY_NAME:
        op, backend = name.split("=")
        shapes = [s for s in VIT_SHAPES.values() if s.head_dim in _sm90.HEAD_DIMS and s.tokens <= _sm90.MOST_KEYS]
        # a row length that ends within every block, and more heads than multiprocessors
        shapes += [replace(shapes[0], tokens=tokens) for tokens in (5, 50, 65, 150, 256, 257)]
        with use_backend(**{op: backend}):
            return [row for shape in shapes for batch in (3, 64) for row in op_rows(op, shape, batch, dtype, device)]
    if name in OPS:
        shapes = [shape for key, shape in VIT_SHAPES.items() if not rehearse or key == "tiny"]
        batches = (3,) if rehearse else (1, 3)
        return [row for shape in shapes for batch in batches for row in op_rows(name, shape, batch, dtype, device)]
    torch.manual_seed(0)
    model = create_model(name)
    torch.nn.init.normal_(model.head.weight, std=0.02)  # a fresh head of zeros hides every difference
    return model_rows(model, torch.randn(2, 3, 224, 224), dtype, device, name)


def main() -> int:
    out, part = sys.argv[1:3]
    rows = measure(part, "--rehearse" in sys.argv)
    Path(out).write_text(json.dumps(rows))
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
