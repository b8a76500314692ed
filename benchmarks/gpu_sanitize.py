"""Every CUDA and Triton kernel once, at small ragged sizes, for compute-sanitizer to watch. Run by benchmarks/gpu.py.

    compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py cuda|triton [--rehearse]

What is computed is compared elsewhere; here it only has to touch memory as it does at every size. ``--rehearse`` runs
the ops without kernels, on the CPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch

import fastvit
from fastvit import _extension, reference, testing
from fastvit.ops import _sm90

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = {
    "cuda": ("layernorm_linear", "linear_residual", "layernorm_mlp"),
    "triton": ("patch_embed", "attention", "attention_packed", "attention_varlen"),
}
# 51 and 33 rows end within every tile; 33 columns take the kernels that read one element at a time
SHAPES = {
    "cuda": (testing.Shape(192, 3, 328, 17), testing.Shape(33, 3, 45, 11)),
    "triton": (testing.Shape(192, 3, 768, 50, patch_size=16, image_size=112), testing.Shape(144, 2, 288, 5, 8, 16)),
}


def cases(part: str, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for shape in SHAPES[part]:
        for op in OPS[part]:
            for dtype in DTYPES:
                inputs = testing.make_inputs(op, shape, 3, dtype, device)
                run = functools.partial(testing.run_with_gradients, getattr(fastvit.ops, op), inputs)
                yield f"{op} {shape.embed_dim} {dtype}", run
                if dtype == torch.float32 and part == "cuda":
                    yield f"{op} {shape.embed_dim} autocast", functools.partial(autocast, run, device)
    if part == "cuda" and device == "cuda" and not _sm90.why_not_built():
        yield from products()
        yield from attentions()


def autocast(run: Callable[[], object], device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        run()


def products() -> Iterator[tuple[str, Callable[[], object]]]:
    """Hopper's products in every tile, ragged on every side; in each residual stream's dtype."""
    ops, rows, cols, depth = torch.ops.fastvit_cuda, 130, 264, 200
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        draw = functools.partial(torch.randn, device="cuda", dtype=dtype)
        x, weight, bias, h, back = draw(rows, depth), draw(cols, depth), draw(cols), draw(rows, cols), draw(depth, cols)
        floats = torch.rand(rows, device="cuda")
        for tile in ("large", "small"):
            yield (
                f"linear_act {name} {tile}",
                functools.partial(ops.linear_act, x, weight, bias, "gelu", True, tile),
            )
            for residual in (h, h.float()):
                yield (
                    f"linear_residual {name} {tile} {residual.dtype}",
                    functools.partial(ops.linear_residual, x, weight, bias, residual, bias, floats, tile),
                )
            yield (
                f"linear_act_grad {name} {tile}",
                functools.partial(ops.linear_act_grad, x, back, h, "gelu", True, torch.float32, tile),
            )


def attentions() -> Iterator[tuple[str, Callable[[], object]]]:
    """Hopper's attention: every number of query blocks in a head, ragged, and more heads than multiprocessors."""
    ops = torch.ops.fastvit_cuda
    for dtype in (torch.bfloat16, torch.float16):
        sizes = [(2, tokens, dim) for tokens in (5, 65, 129, 256, 257) for dim in _sm90.HEAD_DIMS]
        for batch, tokens, dim in [*sizes, (100, 197, 64)]:
            qkv = torch.randn(batch, tokens, 3 * 3 * dim, device="cuda", dtype=dtype)
            yield f"attention {dtype} {tokens} {dim}", functools.partial(ops.attention_packed_fwd, qkv, 3, 0.125)
            if dim == _sm90.BWD_HEAD_DIM and tokens <= _sm90.BWD_KEYS[-1]:
                yield f"attention bwd {dtype} {tokens}", functools.partial(attention_bwd, qkv)
        k = torch.randn(100, 3, 197, 80, device="cuda", dtype=dtype)
        yield f"attention {dtype} class token", functools.partial(ops.attention_fwd, k[:, :, :1], k, k, 0.125)


def attention_bwd(qkv: torch.Tensor) -> None:
    ops, dqkv = torch.ops.fastvit_cuda, torch.empty_like(qkv)
    q, k, v = reference.unpack_qkv(qkv, 3)
    out, lse = ops.attention_fwd(q, k, v, 0.125)
    out = out.transpose(1, 2)
    ops.attention_bwd(*reference.unpack_qkv(dqkv, 3), out, q, k, v, out, lse, 0.125)


def main() -> int:
    part, rehearse = sys.argv[1], "--rehearse" in sys.argv
    missing = _extension.why_not_cuda() if part == "cuda" else _extension.why_not_triton()
    if missing and not rehearse:
        print(f"sanitize: {part} is left out: {'; '.join(missing)}")
        return 0
    count = 0
    with fastvit.use_backend("torch" if rehearse else part):
        for name, run in cases(part, "cpu" if rehearse else "cuda"):
            run()
            if not rehearse:
                torch.cuda.synchronize()  # so that a fault shows under the name of its case
            count += 1
            print(name, flush=True)
    print(f"sanitize: {part}: {count} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
