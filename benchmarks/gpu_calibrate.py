"""What this device gives stock code: copy bandwidth, cuBLAS at ViT-B/16's shapes, PyTorch's attentions, LayerNorm.
And what the MLP's kernels make of it: LayerNorm's passes, and Hopper's products by tile beside cuBLAS and a pass.

Run by benchmarks/gpu.py. Writes {"ceilings": {"tflops", "gbps"}, "calibration": [rows with every raw sample]}.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import _extension
from fastvit.bench.timing import Candidate, interleave, percentile
from fastvit.ops import _sm90, _tiles

ROUNDS = 5
GEMMS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}  # in, out features
ATTENTIONS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Calibration:
    def __init__(self, device: torch.device, rehearse: bool):
        self.device, self.dtype = device, torch.bfloat16
        self.batch = 1 if rehearse else 256
        self.square = 256 if rehearse else 8192
        self.copy_elements = 1 << (20 if rehearse else 30)
        self.rows: list[dict[str, Any]] = []

    def randn(self, *size: int, grad: bool = False) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype, requires_grad=grad)

    def time(
        self,
        name: str,
        call: Callable[[Any], Any],
        prepare: Callable[[], Any] = lambda: None,
        flops: float = 0.0,
        bytes_moved: float = 0.0,
    ) -> None:
        """Add a row; what does not run on this device gets a row that says so."""
        try:
            raw = interleave([Candidate(name, call, prepare)], ROUNDS, self.device)[0]
        except (RuntimeError, NotImplementedError) as error:
            self.rows.append({"name": name, "unavailable": str(error).partition("\n")[0][:200]})
            return
        samples = [sample for samples in raw for sample in samples]
        seconds = statistics.median(samples) / 1000
        row: dict[str, Any] = {"name": name, "dtype": "bfloat16", "batch": self.batch}
        row |= {f"p{share}_ms": percentile(samples, share / 100) for share in (50, 20, 80)}
        row |= {"tflops": flops / seconds / 1e12 or None, "gbps": bytes_moved / seconds / 1e9 or None, "raw_ms": raw}
        self.rows.append(row)
        rate = f"{row['tflops']:.0f} TFLOP/s" if flops else f"{row['gbps']:.0f} GB/s"
        print(f"{name:<24} {row['p50_ms']:9.3f} ms  {rate}", flush=True)

    def run(self) -> None:
        self.copy()
        with torch.no_grad():
            self.square_matmul()
            for name, (k, n) in GEMMS.items():
                self.gemm(name, self.batch * 197, k, n)
        for name, backend in ATTENTIONS.items():
            self.attention(name, backend)
        self.layernorm()
        if not _extension.why_not_cuda() and self.device.type == "cuda":
            with torch.no_grad():
                self.passes()
                self.products()

    def copy(self) -> None:
        source, target = self.randn(self.copy_elements), self.randn(self.copy_elements)
        self.time("copy", lambda _: target.copy_(source), bytes_moved=4.0 * self.copy_elements)

    def square_matmul(self) -> None:
        a, b = self.randn(self.square, self.square), self.randn(self.square, self.square)
        self.time("matmul-square", lambda _: a @ b, flops=2.0 * self.square**3)

    def gemm(self, name: str, m: int, k: int, n: int) -> None:
        x, weight, dout, bias = self.randn(m, k), self.randn(n, k), self.randn(m, n), self.randn(n)
        flops = 2.0 * m * k * n
        self.time(f"{name}-fwd", lambda _: torch.addmm(bias, x, weight.t()), flops=flops)
        self.time(f"{name}-dgrad", lambda _: dout @ weight, flops=flops)
        self.time(f"{name}-wgrad", lambda _: dout.t() @ x, flops=flops)

    def attention(self, name: str, backend: SDPBackend) -> None:
        q, k, v = (self.randn(self.batch, 12, 197, 64, grad=True) for _ in range(3))
        dout = self.randn(self.batch, 12, 197, 64)
        flops, size = 4.0 * self.batch * 12 * 197 * 197 * 64, 2.0 * q.numel()

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        self.time(f"sdpa-{name}-fwd", torch.no_grad()(lambda _: forward()), flops=flops, bytes_moved=4 * size)
        backward = functools.partial(torch.autograd.grad, inputs=(q, k, v), grad_outputs=dout)
        self.time(f"sdpa-{name}-bwd", backward, forward, flops=2.5 * flops, bytes_moved=8 * size)

    def layernorm(self) -> None:
        x, dout = self.randn(self.batch, 197, 768, grad=True), self.randn(self.batch, 197, 768)
        weight, bias = self.randn(768, grad=True), self.randn(768, grad=True)
        size = 2.0 * x.numel()

        def forward() -> Tensor:
            return F.layer_norm(x, (768,), weight, bias, 1e-6)

        self.time("layer-norm-fwd", torch.no_grad()(lambda _: forward()), bytes_moved=2 * size)
        backward = functools.partial(torch.autograd.grad, inputs=(x, weight, bias), grad_outputs=dout)
        self.time("layer-norm-bwd", backward, forward, bytes_moved=3 * size)

    def passes(self) -> None:
        """The LayerNorm kernels alone. Bytes: x and y forward; dy, x and dx backward."""
        ops, x, dy = torch.ops.fastvit_cuda, self.randn(self.batch * 197, 768), self.randn(self.batch * 197, 768)
        weight, bias = self.randn(768), self.randn(768)
        mean, rstd = ops.row_stats(x, 1e-6)
        size = 2.0 * x.numel()
        self.time(
            "fastvit-layernorm-fwd",
            lambda _: ops.layernorm_fwd(x, weight, bias, 1e-6, self.dtype),
            bytes_moved=2 * size,
        )
        self.time(
            "fastvit-layernorm-bwd",
            lambda _: ops.layernorm_bwd(dy, x, mean, rstd, weight, bias, None, True, False),
            bytes_moved=3 * size,
        )

    def products(self) -> None:
        """fc1 + bias + GELU, fc2 + bias + residual and fc2's gradient through GELU: stock calls, and ours by tile."""
        ops, rows = torch.ops.fastvit_cuda, self.batch * 197
        x, h, weight, back = (self.randn(*size) for size in ((rows, 768), (rows, 3072), (3072, 768), (768, 3072)))
        wide, narrow = self.randn(3072), self.randn(768)
        flops = 2.0 * rows * 768 * 3072
        self.time("fc1-gelu-stock", lambda _: F.gelu(torch.addmm(wide, x, weight.t())), flops=flops)
        self.time("fc2-residual-stock", lambda _: x + torch.addmm(narrow, h, back.t()), flops=flops)
        self.time("fc2-dgrad-gelu-stock", lambda _: torch.ops.aten.gelu_backward(x @ back, h).sum(0), flops=flops)
        if _sm90.why_not_built():
            return
        for tile in (tile.name for tile in _tiles.FORWARD["bfloat16"]):
            self.time(
                f"fc1-gelu-{tile}",
                lambda _, tile=tile: ops.linear_act(x, weight, wide, None, None, None, "gelu", True, tile),
                flops=flops,
            )
            self.time(
                f"fc2-residual-{tile}",
                lambda _, tile=tile: ops.linear_residual(h, back, narrow, x, None, None, tile),
                flops=flops,
            )
        for tile in (tile.name for tile in _tiles.BACKWARD["bfloat16"]):
            self.time(
                f"fc2-dgrad-gelu-{tile}",
                lambda _, tile=tile: ops.linear_act_grad(x, back, h, "gelu", True, self.dtype, tile),
                flops=flops,
            )


def ceilings(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """The best rates seen: what any kernel is measured against."""
    for key, name in (("tflops", "matmul-square"), ("gbps", "copy")):
        yield from ((key, row[key]) for row in rows if row["name"] == name and key in row)


def main() -> None:
    rehearse = "--rehearse" in sys.argv
    calibration = Calibration(torch.device("cpu" if rehearse else "cuda"), rehearse)
    calibration.run()
    found = {"ceilings": dict(ceilings(calibration.rows)), "calibration": calibration.rows}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
