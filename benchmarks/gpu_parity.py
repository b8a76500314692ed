"""A part of the parity certificate on the device: an op at ViT's sizes, or a whole model. Run by benchmarks/gpu.py.

python benchmarks/gpu_parity.py OUT attention/bfloat16 [--rehearse]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fastvit.model import create_model
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


MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")


def parts(rehearse: bool) -> list[str]:
    """What can be measured side by side: an op or a model, and a dtype."""
    if rehearse:
        return [f"{name}/bfloat16" for name in (*OPS, "vit_tiny_patch16_224")]
    models = [f"{name}/{dtype}" for name in MODELS for dtype in ("bfloat16", "float32")]
    return models + [f"{op}/{str(dtype).removeprefix('torch.')}" for op in OPS for dtype in DTYPES]


def measure(part: str, rehearse: bool) -> list[dict]:
    name, dtype = part.split("/")[0], getattr(torch, part.split("/")[1])
    device = "cpu" if rehearse else "cuda"
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
