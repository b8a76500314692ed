"""What the pytest-benchmark files share. Settings come from the environment, as pytest's own options stay its own:

BENCH_DTYPE (bfloat16 on a GPU, float32 on a CPU), BENCH_BATCH (256, 8), BENCH_SHAPE (base), BENCH_MODEL.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastvit.bench.model_case import ModelCase
from fastvit.bench.op_case import OpCase
from fastvit.bench.providers import Refused
from fastvit.testing import VIT_SHAPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = getattr(torch, os.environ.get("BENCH_DTYPE", "bfloat16" if DEVICE.type == "cuda" else "float32"))
BATCH = int(os.environ.get("BENCH_BATCH", "256" if DEVICE.type == "cuda" else "8"))
SHAPE = os.environ.get("BENCH_SHAPE", "base")
MODEL = os.environ.get("BENCH_MODEL", "vit_base_patch16_224")
PROVIDERS = os.environ.get("BENCH_PROVIDERS", "fastvit,eager").split(",")


def time_op(benchmark, op: str, mode: str, provider: str) -> None:
    time_case(benchmark, OpCase(op, VIT_SHAPES[SHAPE], BATCH, DTYPE, DEVICE, mode), provider)


def time_model(benchmark, mode: str, provider: str) -> None:
    time_case(benchmark, ModelCase(MODEL, BATCH, DTYPE, DEVICE, mode), provider)


def time_case(benchmark, case: OpCase | ModelCase, provider: str) -> None:
    """Times what ``fastvit.bench`` times, after the same check of the result; a red result fails."""
    try:
        candidate = case.candidate(provider)
    except Refused as refusal:
        pytest.fail(str(refusal))
    benchmark.group = f"{benchmark.name.partition('[')[0]} {case.mode} {DTYPE} batch {BATCH}"
    benchmark.extra_info.update(candidate.notes, flops=case.cost.flops, bytes=case.cost.bytes)

    def call(state) -> None:
        candidate.call(state)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def setup() -> tuple[tuple, dict]:
        state = candidate.prepare()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return (state,), {}

    with candidate.context():
        benchmark.pedantic(call, setup=setup, rounds=10, warmup_rounds=2)
