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

from fastvit import _extension, ops, reference, use_backend
from fastvit.bench.timing import Candidate, interleave, percentile, ratio_by_round
from fastvit.ops import _sm90, _tiles

ROUNDS = 5
GEMMS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}  # in, out features
ATTENTIONS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Calibration:
    """Rows, written to ``path`` as they come: what hangs later takes none of them with it."""

    def __init__(self, device: torch.device, rehearse: bool, path: Path | None = None):
        self.path = path
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
        self.compare([Candidate(name, call, prepare)], flops, bytes_moved)

    def compare(self, candidates: list[Candidate], flops: float = 0.0, bytes_moved: float = 0.0) -> None:
        """Add a row each, timed in turns; ``ratio`` is how many times faster than the first, round by round."""
        candidates = [candidate for candidate in candidates if self.runs(candidate)]
        times = interleave(candidates, ROUNDS, self.device)
        for candidate, raw in zip(candidates, times, strict=True):
            samples = [sample for samples in raw for sample in samples]
            seconds = statistics.median(samples) / 1000
            row: dict[str, Any] = {"name": candidate.provider, "dtype": "bfloat16", "batch": self.batch}
            row |= {f"p{share}_ms": percentile(samples, share / 100) for share in (50, 20, 80)}
            row |= {"tflops": flops / seconds / 1e12 or None, "gbps": bytes_moved / seconds / 1e9 or None}
            ratio = statistics.median(ratio_by_round(times[0], raw))
            self.rows.append(row | {"ratio": ratio, "raw_ms": raw})
            rate = f"{row['tflops']:.0f} TFLOP/s" if flops else f"{row['gbps']:.0f} GB/s"
            faster = f"  {ratio:.2f}x {candidates[0].provider}" if candidate is not candidates[0] else ""
            print(f"{candidate.provider:<28} {row['p50_ms']:9.3f} ms  {rate}{faster}", flush=True)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps({"ceilings": dict(ceilings(self.rows)), "calibration": self.rows}))

    def runs(self, candidate: Candidate) -> bool:
        """Whether it does; a row says why not."""
        try:
            candidate.call(candidate.prepare())
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0][:200]
            self.rows.append({"name": candidate.provider, "unavailable": reason})
            print(f"{candidate.provider:<28} unavailable: {reason}", flush=True)
            return False
        return True

    def run(self) -> None:
        self.copy()
        with torch.no_grad():
            self.square_matmul()
            for name, (k, n) in GEMMS.items():
                self.gemm(name, self.batch * 197, k, n)
        for name, backend in ATTENTIONS.items():
            self.attention(name, backend)
        if self.device.type == "cuda":
            self.attention_traffic()
        self.layernorm()
        if not _extension.why_not_cuda() and self.device.type == "cuda":
            with torch.no_grad():
                self.passes()
                self.products()
            self.attentions()

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

    def attention_traffic(self) -> None:
        import attention_traffic

        forms = attention_traffic.forms(self.batch, 12, 197, 64, self.device, self.dtype)
        for name, given in forms.items():
            size = 2.0 * given[0].numel()
            self.time(
                f"attention-traffic-{name}",
                lambda _, given=given: attention_traffic.traffic(*given),
                bytes_moved=4 * size,
            )

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
        """The LayerNorm kernels alone. Bytes: x and y forward; dy, x and dx backward, dresidual and y where wanted."""
        ops, rows = torch.ops.fastvit_cuda, self.batch * 197
        dy, weight, bias = self.randn(rows, 768), self.randn(768), self.randn(768)
        for stream in (self.dtype, torch.float32):  # as autocast keeps the residual stream
            x = self.randn(rows, 768).to(stream)
            _, mean, rstd = ops.layernorm_fwd(x, weight, bias, 1e-6, self.dtype)
            given = (dy, x, mean, rstd, weight, bias)
            narrow, wide = 2.0 * x.numel(), float(x.numel() * x.element_size())
            name = "fastvit-layernorm" + ("" if stream == self.dtype else "-fp32-stream")
            self.time(
                f"{name}-fwd",
                lambda _, x=x: ops.layernorm_fwd(x, weight, bias, 1e-6, self.dtype),
                bytes_moved=wide + narrow,
            )
            for suffix, dresidual, want_y in (("", None, False), ("-residual", x, False), ("-residual-y", x, True)):
                self.time(
                    f"{name}-bwd{suffix}",
                    lambda _, given=(*given, dresidual, True, want_y): ops.layernorm_bwd(*given),
                    bytes_moved=narrow * (1 + want_y) + wide * (2 if dresidual is None else 3),
                )

    def attentions(self) -> None:
        """On a packed projection: PyTorch's, Triton's and Hopper's, in turns, forward and backward."""
        if _sm90.why_not_built():
            return
        for tokens in (197, 50, 256):
            size = 2.0 * self.batch * tokens * 768
            flops = 2.0 * size * tokens
            with torch.no_grad():
                self.compare(self.attention_forwards(tokens), flops, 4 * size)
            self.compare(self.attention_backwards(tokens), 2.5 * flops, 8 * size)

    def attention_forwards(self, tokens: int) -> list[Candidate]:
        return [
            Candidate(f"attention-{tokens}-{name}", lambda given, run=run: run(*given), lambda given=given: given)
            for name, run, given in self.attention_runs(tokens)
        ]

    def attention_backwards(self, tokens: int) -> list[Candidate]:
        dout = self.randn(self.batch, tokens, 768)

        def candidate(name: str, run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Candidate:
            leaves = [t.detach().requires_grad_() for t in given]
            like = dout if len(leaves) == 1 else dout.unflatten(-1, (12, 64)).transpose(1, 2)

            def backward(out: Tensor) -> Any:
                return torch.autograd.grad(out, leaves, like)

            return Candidate(f"attention-{tokens}-{name}-bwd", backward, lambda: run(*leaves))

        return [candidate(*each) for each in self.attention_runs(tokens)]

    def attention_runs(self, tokens: int) -> Iterator[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]]:
        """Names, functions and what they take."""
        qkv = self.randn(self.batch, tokens, 3 * 768)

        def stock(*heads: Tensor, backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads)

        def ours(packed: Tensor, backend: str) -> Tensor:
            with use_backend(attention_packed=backend):
                return ops.attention_packed(packed, 12)

        for name, backend in ATTENTIONS.items():
            yield name, functools.partial(stock, backend=backend), reference.unpack_qkv(qkv, 12)
        for name in ("triton", "cuda"):
            yield name, functools.partial(ours, backend=name), (qkv,)

    def products(self) -> None:
        """fc1 + bias + GELU, fc2 + bias + residual and fc2's gradient through GELU: stock calls, and ours by tile."""
        ops, rows = torch.ops.fastvit_cuda, self.batch * 197
        x, h, weight, back = (self.randn(*size) for size in ((rows, 768), (rows, 3072), (3072, 768), (768, 3072)))
        wide, narrow = self.randn(3072), self.randn(768)
        stream = x.float()
        flops = 2.0 * rows * 768 * 3072
        built = not _sm90.why_not_built()
        tiles = [tile.name for tile in _tiles.TILES["linear_act"]] if built else []

        def linear_act(_: Any, tile: str) -> Any:
            return ops.linear_act(x, weight, wide, "gelu", True, tile)

        def linear_residual(_: Any, tile: str, residual: Tensor = x) -> Any:
            return ops.linear_residual(h, back, narrow, residual, None, None, tile)

        def linear_act_grad(_: Any, tile: str) -> Any:
            return ops.linear_act_grad(x, back, h, "gelu", True, self.dtype, tile)

        def by_tile(name: str, call: Callable[..., Any], **more: Any) -> list[Candidate]:
            return [Candidate(f"{name}-{tile}", functools.partial(call, tile=tile, **more)) for tile in tiles]

        stock = Candidate("fc1-gelu-stock", lambda _: F.gelu(torch.addmm(wide, x, weight.t())))
        self.compare([stock, *by_tile("fc1-gelu", linear_act)], flops)
        stock = Candidate("fc2-residual-stock", lambda _: x + torch.addmm(narrow, h, back.t()))
        self.compare([stock, *by_tile("fc2-residual", linear_residual)], flops)
        stock = Candidate("fc2-residual-fp32-stream-stock", lambda _: stream + torch.addmm(narrow, h, back.t()))
        ours = by_tile("fc2-residual-fp32-stream", linear_residual, residual=stream)
        self.compare([stock, *ours], flops)
        stock = Candidate("fc2-dgrad-gelu-stock", lambda _: torch.ops.aten.gelu_backward(x @ back, h).sum(0))
        self.compare([stock, *by_tile("fc2-dgrad-gelu", linear_act_grad)], flops)


def ceilings(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """The best rates seen: what any kernel is measured against."""
    for key, name in (("tflops", "matmul-square"), ("gbps", "copy")):
        yield from ((key, row[key]) for row in rows if row["name"] == name and key in row)


def main() -> None:
    rehearse = "--rehearse" in sys.argv
    Calibration(torch.device("cpu" if rehearse else "cuda"), rehearse, Path(sys.argv[1])).run()


if __name__ == "__main__":
    main()
