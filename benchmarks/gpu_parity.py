"""The parity certificate on the device: ops at ViT's sizes, and whole models. Run by benchmarks/gpu.py."""

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


def main() -> int:
    rehearse = "--rehearse" in sys.argv
    device = "cpu" if rehearse else "cuda"
    shapes = {name: shape for name, shape in VIT_SHAPES.items() if not rehearse or name == "tiny"}
    rows = []
    for dtype in DTYPES[:1] if rehearse else DTYPES:
        for shape in shapes.values():
            for batch in (3,) if rehearse else (1, 3):
                for op in OPS:
                    rows += op_rows(op, shape, batch, dtype, device)
    for name in ("vit_tiny_patch16_224",) if rehearse else ("vit_small_patch16_224", "vit_base_patch16_224"):
        torch.manual_seed(0)
        model = create_model(name)
        torch.nn.init.normal_(model.head.weight, std=0.02)  # a fresh head of zeros hides every difference
        for dtype in (torch.bfloat16,) if rehearse else (torch.bfloat16, torch.float32):
            rows += model_rows(model, torch.randn(2, 3, 224, 224), dtype, device, name)
    passed = all(row["passed"] for row in rows)
    Path(sys.argv[1]).write_text(json.dumps({"passed": passed, "rows": rows}))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
