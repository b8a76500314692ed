"""What reaches the CUDA driver when a launch is replayed, from Python or C++, is what Triton gave it. Needs no GPU."""

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
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="no gcc and g++"),
]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """case -> three calls -> launches; see fake_cuda_driver.py."""
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, HERE / "fake_cuda_driver.c", "-o", library], check=True)
    by_cpp = folder / "launch_compiled.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{include}", f"-I{HERE.parent / 'csrc'}"]
    subprocess.run([*command, HERE / "launch_compiled.cpp", "-o", by_cpp], check=True)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_LIBCUDA_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, HERE / "fake_cuda_driver.py", library, by_cpp],
        env=env,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_replayed_launches_are_those_that_triton_made(calls):
    for case, made in calls.items():
        assert made[0], case
        assert len(made) == (4 if case in ("packed_short", "packed_streaming", "few_forward") else 3), case
        assert all(call == made[0] for call in made), case


def test_launches_name_every_tensor(calls):
    def pointers(case, number=0, given=None):
        return calls[case][0][number]["parameters"][:given]

    for size in ("short", "streaming"):
        assert pointers(f"packed_{size}", given=5) == ["q", "k", "v", "out", "lse"]
        assert pointers(size, 0, 5) == ["q", "k", "v", "out", "lse"]
        assert pointers(size, 1, 8) == ["q", "k", "v", "out", "dout", "dq", "lse", "unknown 0"]
        assert pointers(size, 2, 8) == ["q", "k", "v", "dout", "dk", "dv", "lse", "unknown 0"]  # dQ's delta
    assert pointers("few", 1, 9) == ["q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse"]
    shared = ["q", "k", "v", "out", "top", "log"]
    for case, more in {"mask": ["mask"], "causal_dropout": ["seed"], "varlen": ["cu"]}.items():
        assert pointers(case, given=6 + len(more)) == [*shared, *more]
    assert pointers("prepared", given=9) == [*shared, "qw", "kw", "rope"]
    assert pointers("patch_embed", given=8) == ["images", "weight", "bias", "pos", "prefix", "mean", "std", "tokens"]
    assert pointers("patch_embed_channels_last", given=3) == ["images", "weight", "tokens"]


def test_launches_go_to_the_current_stream(calls):
    assert {launch["stream"] for made in calls.values() for call in made for launch in call} == {7}
