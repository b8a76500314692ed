"""What reaches the CUDA driver when a launch is replayed is what reached it when Triton made it. Needs no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from fastvit.kernels import _launch  # noqa: E402

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver is here"),
    pytest.mark.skipif(not _launch.REPLAYED, reason="launches are not replayed with this Triton"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """name of the sizes -> pass -> calls -> launches; see fake_cuda_driver.py."""
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, HERE / "fake_cuda_driver.c", "-o", library], check=True)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_LIBCUDA_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, HERE / "fake_cuda_driver.py", library],
        env=env,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", ["short", "streaming"])
@pytest.mark.parametrize("direction", ["packed", "fwd", "bwd"])
def test_replayed_launches_are_those_that_triton_made(calls, size, direction):
    first, second, third = calls[size][direction]
    assert len(first) == (2 if direction == "bwd" else 1)
    assert first == second == third


@pytest.mark.parametrize("size", ["short", "streaming"])
def test_the_first_launch_names_every_tensor(calls, size):
    (launch,) = calls[size]["packed"][0]
    assert launch["parameters"][:5] == ["q", "k", "v", "out", "lse"]
    assert launch["stream"] == 7
    assert launch["function"]
    dq, dkv = calls[size]["bwd"][0]
    assert dq["parameters"][:8] == ["q", "k", "v", "out", "dout", "dq", "lse", "unknown 0"]
    assert dkv["parameters"][:8] == ["q", "k", "v", "dout", "dk", "dv", "lse", "unknown 0"]  # dQ's delta
