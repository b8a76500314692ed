"""What the bench stage of benchmarks/gpu.py times, in order of worth:  python benchmarks/gpu_jobs.py OUT ARGUMENTS"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPS = ["attention_packed", "layernorm_mlp", "layernorm_linear", "linear_residual", "patch_embed"]
PLAIN = ["fastvit", "eager"]
BASE, LARGE = ["vit_base_patch16_224"], ["vit_large_patch16_224"]


@dataclass(frozen=True)
class Job:
    """One call of ``fastvit.bench.run`` in a process of its own, within ``seconds``."""

    name: str
    seconds: float
    arguments: dict[str, Any]


def plan(rehearse: bool = False) -> list[Job]:
    """First what needs no compilation, then torch.compile at its strongest, which may run out of time."""
    autocast = [*PLAIN, "fastvit-autocast", "eager-autocast"]
    compiled = [*PLAIN, "compile"]
    graphs = ["fastvit", "eager", "fastvit-graph", "eager-graph"]
    own = "fastvit-cuda-attention"
    jobs = [
        Job("infer", 40, {"models": BASE, "mode": "infer", "providers": autocast}),
        Job("train", 60, {"models": BASE, "mode": "train", "providers": [*autocast, "fastvit-lean"]}),
        Job("train-32", 30, {"models": BASE, "mode": "train", "batch": 32, "providers": autocast}),
        Job("batch-1", 30, {"models": BASE, "mode": "infer", "batch": 1, "providers": graphs, "rounds": 15}),
        Job("ops-fwd", 40, {"ops": OPS, "mode": "fwd"}),
        Job("ops-bwd", 50, {"ops": OPS, "mode": "bwd"}),
        Job("attention", 25, {"ops": OPS[:1], "mode": "fwd", "providers": ["fastvit", own, "eager"]}),
        Job("attention-bwd", 30, {"ops": OPS[:1], "mode": "bwd", "providers": ["fastvit", own, "eager"]}),
        Job("infer-attention", 30, {"models": BASE, "mode": "infer", "providers": ["fastvit", own]}),
        Job("train-attention", 50, {"models": BASE, "mode": "train", "providers": ["fastvit", own, "eager"]}),
        Job("batch-1-attention", 30, {"models": BASE, "batch": 1, "providers": ["fastvit-graph", f"{own}-graph"]}),
        Job("infer-compile", 120, {"models": BASE, "mode": "infer", "providers": compiled}),
        Job("large-infer", 30, {"models": LARGE, "mode": "infer"}),
        Job("large-train", 40, {"models": LARGE, "mode": "train", "batch": 128}),
        Job("train-compile", 200, {"models": BASE, "mode": "train", "providers": compiled}),
        Job("ops-fwd-compile", 120, {"ops": OPS, "mode": "fwd", "providers": compiled}),
        Job("batch-1-compile", 90, {"models": BASE, "batch": 1, "providers": ["fastvit-graph", "eager", "compile"]}),
        Job("ops-bwd-compile", 200, {"ops": OPS, "mode": "bwd", "providers": compiled}),
        Job("large-infer-compile", 150, {"models": LARGE, "providers": compiled}),
        Job(
            "large-train-compile",
            250,
            {"models": LARGE, "mode": "train", "batch": 128, "providers": compiled},
        ),
    ]
    defaults = {"dtype": "bfloat16", "batch": 256, "device": "cuda", "providers": PLAIN, "rounds": 7}
    jobs = [Job(job.name, job.seconds, defaults | job.arguments) for job in jobs]
    return [_in_small(job) for job in jobs[:6]] if rehearse else jobs


def _in_small(job: Job) -> Job:
    small: dict[str, Any] = {"batch": 1, "device": "cpu", "rounds": 2}
    small |= {"shape": "tiny"} if "ops" in job.arguments else {"models": ["vit_tiny_patch16_224"]}
    providers = [name for name in job.arguments["providers"] if "graph" not in name]
    return Job(job.name, job.seconds, job.arguments | small | {"providers": providers})


def main(out: str, arguments: str) -> None:
    from fastvit import bench

    result = bench.run(**json.loads(arguments))
    Path(out).write_text(json.dumps(result | {"table": bench.table(result)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
