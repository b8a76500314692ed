"""One binary for every machine: the same kernels compiled for several instruction sets, each as accurate."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
ROOT = Path(__file__).resolve().parent.parent
SETS = ("baseline", "avx2", "avx512")
BEST = C.cpu_capabilities()["fp32"]


def run(isa: str, *command: str) -> subprocess.CompletedProcess:
    """In a process of its own: the choice is made once."""
    env = os.environ | {"FASTVIT_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("isa", SETS[: SETS.index(BEST)])
def test_lower_sets_are_as_accurate(isa):
    files = [f"tests/test_cpp_{name}.py" for name in ("parity", "attention", "attention_heads", "attention_varlen")]
    outcome = run(isa, "-m", "pytest", "-p", "no:cacheprovider", *files)
    assert outcome.returncode == 0, outcome.stdout[-3000:]


def test_the_set_asked_for_runs():
    for isa in SETS[: SETS.index(BEST) + 1]:
        outcome = run(isa, "-c", "from fastvit import _C; print(_C.cpu_capabilities()['fp32'])")
        assert outcome.stdout.strip() == isa, outcome.stderr


@pytest.mark.parametrize(
    ("isa", "message"),
    [("sse9", "FASTVIT_CPU_ISA is sse9, expected avx512, avx2 or baseline")]
    + [(isa, f"FASTVIT_CPU_ISA is {isa}, which this machine does not have") for isa in SETS[SETS.index(BEST) + 1 :]],
)
def test_a_set_that_cannot_run_is_an_error(isa, message):
    outcome = run(isa, "-c", "from fastvit import _C; _C.cpu_capabilities()")
    assert outcome.returncode != 0
    assert message in outcome.stderr


@pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64", reason="reads x86-64 machine code"
)
@pytest.mark.parametrize("isa", SETS[1:])
def test_sums_of_the_gemm_stay_in_registers(isa):
    """A vector type wider than a register would make every multiply-add read and write the stack."""
    symbol = f"_ZN7fastvit3cpu{len(isa)}{isa}9gemm_fp32ERKNS0_8GemmTileIfEE"
    command = ["objdump", "--no-show-raw-insn", f"--disassemble={symbol}", C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    products = [line for line in code if "vfmadd" in line]
    assert len(products) > 12, "the function was not found"
    assert not [line for line in products if "rsp" in line or "rbp" in line]
    assert not [line for line in code if "vaddss" in line], "a broadcast computes"
