"""The CPU ops where the process matters: OpenMP's environment, and children that are forked after the ops ran."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("fastvit._C", reason="the C++ extension is not built")

PRELUDE = """
import json, os, threading
import torch
from fastvit import _C, ops
from fastvit.testing import Shape, make_inputs, run_with_gradients

SHAPE = Shape(embed_dim=80, num_heads=2, hidden_dim=200, tokens=131, patch_size=8, image_size=40)
CASES = [(op, make_inputs(op, SHAPE, 2, torch.float32)) for op in ("patch_embed", "attention_packed", "layernorm_mlp")]

def run():
    with torch.no_grad():
        outputs = [getattr(ops, op)(**inputs) for op, inputs in CASES]  # on packs that are kept
    results = [value for op, inputs in CASES for value in run_with_gradients(getattr(ops, op), inputs).values()]
    return outputs + results

def same(ours, expected):
    return all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
"""


def python(code: str, **environment: str) -> dict:
    """What the last line of a fresh interpreter's output says. A hang is a failure after two minutes."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=outside | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COUNT_THREADS = """
torch.randn(1000, 1000).mul(2)  # starts PyTorch's pool
before = len(os.listdir("/proc/self/task"))
results = run()
print(json.dumps({"threads": _C.cpu_capabilities()["threads"], "stock": torch.get_num_threads(),
                  "started": len(os.listdir("/proc/self/task")) - before,
                  "checksums": [float(value.double().sum()) for value in results]}))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_omp_num_threads():
    """The pool is PyTorch's own, no second one is started; 0 is no number, so OpenMP takes its default."""
    one, two, default = (python(COUNT_THREADS, OMP_NUM_THREADS=number) for number in ("1", "2", "0"))
    assert one["threads"] == 1
    for found in (one, two, default):
        assert found["threads"] == found["stock"]
        assert found["started"] == 0
        assert found["checksums"] == one["checksums"]


FORK = """
torch.set_num_threads(3)
expected = run()
child = os.fork()
if child == 0:
    fresh = []
    ok = same(run(), expected) and torch.get_num_threads() == 1
    torch.set_num_threads(2)
    ok = ok and same(run(), expected)
    thread = threading.Thread(target=lambda: fresh.append(same(run(), expected)))
    thread.start(); thread.join()
    os._exit(0 if ok and fresh == [True] else 1)
_, status = os.waitpid(child, 0)
print(json.dumps({"child": os.waitstatus_to_exitcode(status), "parent": same(run(), expected),
                  "threads": torch.get_num_threads()}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_after_use():
    """The child's pool is gone: stock PyTorch would wait for it for ever, the ops go on with one thread."""
    assert python(FORK) == {"child": 0, "parent": True, "threads": 3}


WORKERS = """
import multiprocessing
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
expected = run()

def work(_):
    return same(run(), expected)

class Features(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([work(index)])

loaded = [bool(batch) for batch in DataLoader(Features(), num_workers=2, multiprocessing_context="fork")]
with multiprocessing.get_context("fork").Pool(2) as pool:
    pooled = pool.map(work, range(4))
print(json.dumps({"loaded": loaded, "pooled": pooled}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_workers():
    assert python(WORKERS) == {"loaded": [True] * 4, "pooled": [True] * 4}
