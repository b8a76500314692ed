"""Time the candidate tiles of the attention kernels on this GPU and print the table to commit.

    python benchmarks/tune_attention.py [--dtype bfloat16] [--dims 64,80] [--tokens 197,257,577] [--batch 64]
    python benchmarks/tune_attention.py --list        the candidates; needs no GPU

What is printed goes into ATTENTION_MEASURED of kernels/_configs.py; lengths that no entry covers keep the rule there.
An entry of a whole-sequence form holds for the lengths that its tiles fit, one of a streaming form for its own alone.
Needs a GPU: nothing about speed can be told without one. Rerun the parity tests after changing the table.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from fastvit.kernels._configs import AttentionSettings, attention_settings

from fastvit.kernels import _configs

KERNELS = ("fwd", "bwd", "bwd_dq")


def candidates(kernel: str, dtype: torch.dtype, dim: int, keys: int, arch: int) -> list[AttentionSettings]:
    """The rule's own choice first, then its neighbours: streaming with a matrix instruction's rows a warp group, and
    whole-sequence."""
    found = [attention_settings(kernel, dtype, dim, keys, arch)]
    cols = found[0].cols
    if dtype.itemsize == 4:
        sizes = product((16, 32, 64), (16, 32), (4, 8), (2,))
        return list(
            dict.fromkeys(found + [AttentionSettings(cols, m, n, num_warps=w, num_stages=s) for m, n, w, s in sizes])
        )
    owned = ((64, 4), (128, 8))  # the side that owns a program's sums has 16 rows for each warp
    for (own, warps), other, stages, registers in product(owned, (32, 64, 128), (2, 3), (None, 128, 80)):
        m, n = (other, own) if kernel == "bwd" else (own, other)
        if registers != 80 or other == 32:  # fewer registers let more programs share a multiprocessor
            found.append(AttentionSettings(cols, m, n, num_warps=warps, num_stages=stages, max_registers=registers))
    if kernel == "fwd" and keys <= 256 and dim <= 64:
        forms = {_configs.power_of_two_parts(keys, 16, parts) for parts in (1, 3)} | {(128, 128)}
        for form, (m, warps), running in product(sorted(forms), owned, (False, True)):
            stages = 1 if running else 2  # queries that wait in shared memory would cost a program
            choice = AttentionSettings(cols, m, keys=form, num_warps=warps, num_stages=stages, running=running)
            found.append(choice)
            if len(form) > 1:  # one tile of all keys does not fit
                found.append(replace(choice, max_registers=128))
    if kernel == "bwd" and keys <= 256 and dim <= 64:
        for form, m, warps in product(((128, 128), (256,)), (16, 32, 64), (8, 16)):
            found.append(AttentionSettings(cols, m, keys=form, num_warps=warps))
    return list(dict.fromkeys(found))


def first_and_last(settings: AttentionSettings, tokens: int) -> tuple[int, int]:
    """The lengths that an entry may serve: only the last tile of a whole-sequence form may be ragged."""
    if not settings.short:
        return tokens, tokens
    return sum(settings.keys[:-1]) + 1, sum(settings.keys)


class Inputs:
    """Packed q, k, v at one shape, with what the backward reads, and the launches of each pass."""

    def __init__(self, batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype):
        from fastvit.kernels._launch import limits

        from fastvit.kernels import attention as kernels

        self.kernels, self.scale = kernels, dim**-0.5
        qkv = torch.randn(batch, tokens, 3, heads, dim, device="cuda").to(dtype)
        self.qkv = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        self.grads = torch.empty_like(qkv).permute(2, 0, 3, 1, 4).unbind(0)
        self.out, self.lse = kernels.attention_fwd(*self.qkv, self.scale)
        self.dout = torch.randn_like(self.out)
        self.limits = limits(qkv.device)

    def launches(self, chosen: dict[str, AttentionSettings]) -> list[Any]:
        """The launch of the forward, or those of the backward, with ``chosen`` settings."""
        module, rule = self.kernels, attention_settings

        def choose(kernel: str, *args: Any, **kwargs: Any) -> AttentionSettings:
            return chosen.get(kernel) or rule(kernel, *args, **kwargs)

        module.attention_settings = choose
        try:
            if "fwd" in chosen:
                return [module._fwd_launch(*self.qkv, self.out, self.lse, self.scale, self.limits)]
            return module._bwd_launches(self.dout, *self.qkv, self.out, self.lse, self.scale, *self.grads, self.limits)
        finally:
            module.attention_settings = rule


def microseconds(run: Callable[[], None], rounds: int = 20) -> float:
    """Median of CUDA event times, after warming up. A candidate that does not fit the device is infinitely slow."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        for _ in range(3):
            run()
    except (OutOfResources, PTXASError, RuntimeError):
        return float("inf")
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def compile_part(shape: tuple, dtype: torch.dtype, arch: int, part: int, parts: int) -> None:
    """Every ``parts``-th candidate into Triton's cache."""
    heads, tokens, dim = shape
    inputs = Inputs(1, heads, tokens, dim, dtype)
    jobs = [(kernel, choice) for kernel in KERNELS for choice in candidates(kernel, dtype, dim, tokens, arch)]
    streams = next(choice for kernel, choice in jobs if kernel == "bwd" and not choice.short)
    for kernel, choice in jobs[part::parts]:
        launches = inputs.launches({"bwd": streams, kernel: choice})
        with contextlib.suppress(Exception):  # what does not compile is found again, and left out, when it is timed
            launches[-1 if kernel == "bwd" else 0].compile()


def compile_all(shape: tuple, dtype: torch.dtype, arch: int) -> None:
    """On all cores: compiling takes longer than timing."""
    parts = max(1, (os.cpu_count() or 2) - 1)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_part, args=(shape, dtype, arch, part, parts)) for part in range(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def time_all(
    inputs: Inputs, kernel: str, choices: list[AttentionSettings], which: int, fixed: dict[str, AttentionSettings]
) -> tuple[float, AttentionSettings]:
    """The fastest choice for ``kernel``, whose launch has number ``which`` when the ``fixed`` settings stand."""
    timed = []
    for choice in choices:
        launch = inputs.launches({**fixed, kernel: choice})[which]
        timed.append((microseconds(launch.run), choice))
        print(f"# {kernel:<7} {timed[-1][0]:9.1f} us  {choice}", flush=True)
    return min(timed, key=lambda pair: pair[0])


def tune(
    inputs: Inputs, dtype: torch.dtype, dim: int, tokens: int, arch: int
) -> Iterator[tuple[str, AttentionSettings]]:
    """The fastest settings of each kernel; for the backward the faster of one whole-sequence kernel and a pair."""
    yield "fwd", time_all(inputs, "fwd", candidates("fwd", dtype, dim, tokens, arch), 0, {})[1]
    choices = candidates("bwd", dtype, dim, tokens, arch)
    streams, whole = ([c for c in choices if c.short == short] for short in (False, True))
    dkv_time, dkv = time_all(inputs, "bwd", streams, 1, {})
    dq_time, dq = time_all(inputs, "bwd_dq", candidates("bwd_dq", dtype, dim, tokens, arch), 0, {"bwd": dkv})
    whole_time, best = time_all(inputs, "bwd", whole, 0, {}) if whole else (float("inf"), dkv)
    if whole_time <= dkv_time + dq_time:
        yield "bwd", best
    else:
        yield "bwd", dkv
        yield "bwd_dq", dq


def entry(key: tuple, found: list[tuple[int, int, AttentionSettings]]) -> str:
    lines = [f"    {key}: ("] + [f"        ({a}, {b}, {settings})," for a, b, settings in sorted(found, key=str)]
    return "\n".join([*lines, "    ),"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dims", default="64")
    parser.add_argument("--tokens", default="197,257,577,1025")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--list", action="store_true", help="print the candidates of sm_90 and time nothing")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    shapes = list(product(map(int, args.dims.split(",")), map(int, args.tokens.split(","))))
    if args.list:
        for (dim, tokens), kernel in product(shapes, KERNELS):
            for choice in candidates(kernel, dtype, dim, tokens, 90):
                print(f"{kernel:<7} d{dim} n{tokens} {choice}")
        return 0
    if not torch.cuda.is_available():
        print("tune_attention: needs a GPU, and torch.cuda.is_available() is False; --list shows the candidates")
        return 2
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    table: dict[tuple, list] = {}
    for dim, tokens in shapes:
        print(f"# d{dim} n{tokens}")
        compile_all((args.heads, tokens, dim), dtype, arch)
        inputs = Inputs(args.batch, args.heads, tokens, dim, dtype)
        for kernel, settings in tune(inputs, dtype, dim, tokens, arch):
            table.setdefault((arch, kernel, args.dtype, dim), []).append((*first_and_last(settings, tokens), settings))
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, batch {args.batch}, {args.heads} heads")
    print("ATTENTION_MEASURED = {\n" + "\n".join(entry(key, found) for key, found in table.items()) + "\n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
