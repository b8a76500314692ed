"""What `make gpu` does, as far as a machine without a GPU can tell: its stages, and their code on stand-ins."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_passes
import pytest
import torch

import fastvit
from fastvit import dispatch
from fastvit.ops import _sm90

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    return gpu


def test_stages_fit_into_ten_minutes(gpu):
    assert list(gpu.STAGES) == ["build", "test", "sanitize", "calibrate", "bench"]
    assert sum(gpu.STAGES.values()) <= gpu.TOTAL_SECONDS <= 600


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--stages=test,walk", "--stages has 'walk', expected some of build,"), ("--jobs=infer,run", "--jobs has 'run'")],
)
def test_unknown_names_are_refused(gpu, monkeypatch, capsys, argument, said):
    monkeypatch.setattr(sys, "argv", ["gpu.py", argument])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit):
        gpu.main()
    assert said in capsys.readouterr().err


def test_sanitize_without_the_tool_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "run", lambda *_, **__: (0, "ran\n"))
    outcome = gpu.sanitize(10, True)
    assert "compute-sanitizer is neither on the PATH nor under CUDA_HOME" in capsys.readouterr().out
    assert (outcome["ok"], outcome["watched"]) == (True, False)
    assert set(outcome["runs"]) == {"cuda unwatched", "triton unwatched"}


@pytest.mark.parametrize(("code", "state"), [(0, "clean"), (9, "FOUND ERRORS"), (1, "exit 1"), (None, "out of time")])
def test_sanitize_reports_each_tool(gpu, monkeypatch, capsys, code, state):
    commands = []
    monkeypatch.setattr(gpu.shutil, "which", lambda tool, **_: f"/opt/{tool}")
    monkeypatch.setattr(gpu, "run", lambda command, *_, **__: commands.append(command) or (code, "=== SUMMARY\n"))
    outcome = gpu.sanitize(10, False)
    assert capsys.readouterr().out.count(f": {state}: === SUMMARY") == 4
    assert outcome["ok"] == (code == 0)
    assert {(c[2], c[-1]) for c in commands} == {(t, p) for t in gpu.SANITIZERS for p in ("cuda", "triton")}
    assert all(command[:2] == ["/opt/compute-sanitizer", "--tool"] for command in commands)


def test_sanitize_reaches_every_kernel(gpu, monkeypatch):
    """Every op of each part; each tile of Hopper's products, in both streams, on what its meaning takes."""
    import gpu_sanitize

    randn, rand = torch.randn, torch.rand
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **kw: randn(*size, **kw))
    monkeypatch.setattr(torch, "rand", lambda *size, device=None, **kw: rand(*size, **kw))
    monkeypatch.setattr(torch.ops, "fastvit_cuda", SimpleNamespace(**{f.__name__: f for f in cuda_passes.PRODUCTS}))
    names = []
    for name, run in gpu_sanitize.products():
        run()
        names.append(name)
    assert len(names) == len(set(names)) == 2 * 2 * (1 + 2 + 1)
    ops = {name.split()[0] for part in ("cuda", "triton") for name, _ in gpu_sanitize.cases(part, "cpu")}
    assert ops == set(fastvit.dispatch.OPS) - {"made_up"}


def test_calibration_of_the_kernels(gpu, monkeypatch):
    """LayerNorm in GB/s in both streams; each product's tiles beside the stock calls, with the ratio of each round."""
    import gpu_calibrate

    functions = {f.__name__: f for f in cuda_passes.PASSES + cuda_passes.PRODUCTS}
    functions["linear_residual"] = lambda *_: (_ for _ in ()).throw(RuntimeError("linear_residual: out of luck"))
    monkeypatch.setattr(torch.ops, "fastvit_cuda", SimpleNamespace(**functions))
    monkeypatch.setattr(_sm90, "why_not_built", lambda *_: [])
    monkeypatch.setattr(gpu_calibrate, "ROUNDS", 1)
    calibration = gpu_calibrate.Calibration(torch.device("cpu"), rehearse=True)
    with torch.no_grad():
        calibration.passes()
        calibration.products()
    rows = {row["name"]: row for row in calibration.rows}
    for stream in ("", "-fp32-stream"):
        for kind in ("fwd", "bwd", "bwd-residual"):
            assert rows[f"fastvit-layernorm{stream}-{kind}"]["gbps"] > 0
    assert rows["fc1-gelu-stock"]["ratio"] == 1
    for tile in ("large", "small"):
        assert rows[f"fc1-gelu-{tile}"]["ratio"] > 0
        assert rows[f"fc2-dgrad-gelu-{tile}"]["ratio"] > 0
        assert rows[f"fc2-residual-fp32-stream-{tile}"]["unavailable"] == "linear_residual: out of luck"
    assert rows["fc2-residual-stock"]["tflops"] > 0
    json.dumps(calibration.rows)


def test_what_auto_passes_by_is_in_the_certificate_where_it_runs(gpu, monkeypatch):
    import gpu_parity

    named = {f"{name}/{dtype}" for name in gpu_parity.BY_NAME for dtype in ("bfloat16", "float16")}
    assert not named & set(gpu_parity.parts(False))
    monkeypatch.setattr(gpu_parity.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_parity._sm90, "why_not_built", lambda *_: [])
    assert named <= set(gpu_parity.parts(False))
    asked = []
    monkeypatch.setattr(
        gpu_parity, "op_rows", lambda *given: asked.append((given, dispatch.OPS[given[0]].choice)) or []
    )
    gpu_parity.measure("attention_packed=cuda/float16", True)
    assert {choice for _, choice in asked} == {"cuda"}
    assert {shape.tokens for (_, shape, *_), _ in asked} >= {5, 65, 197, 256}
    assert {shape.head_dim for (_, shape, *_), _ in asked} == {64, 80}


def test_attention_in_the_calibration(gpu, monkeypatch):
    """Stock attentions and ours by name, in turns; what does not run here says so."""
    import gpu_calibrate

    calibration = gpu_calibrate.Calibration(torch.device("cpu"), rehearse=True)
    calibration.attentions()
    assert calibration.rows == []
    monkeypatch.setattr(gpu_calibrate._sm90, "why_not_built", lambda *_: [])
    monkeypatch.setattr(gpu_calibrate, "ROUNDS", 1)
    calibration.attentions()
    rows = {row["name"]: row for row in calibration.rows}
    own = ("cudnn", "triton", "cuda")
    ways = ("", "-bwd")
    assert set(rows) >= {f"attention-{tokens}-{name}{way}" for tokens in (197, 50, 256) for name in own for way in ways}
    assert rows["attention-50-flash-bwd"]["tflops"] > 0
    json.dumps(calibration.rows)


def test_what_hangs_takes_nothing_with_it(gpu, monkeypatch, tmp_path):
    """Kernels that no GPU has run yet are tried apart, and have a part of the time only."""
    runs = {}

    def run(command, limit, name, **_):
        runs[name] = [word for word in command if word.startswith("tests/")], limit
        (tmp_path / f"{name}.log").write_text("[gw0] [ 50%] PASSED tests/test_x.py::test_y[cuda]\n")
        return None if name == "pytest-test_cuda_attention" else 0, ""

    monkeypatch.setattr(gpu, "run", run)
    found = gpu.run_pytest(100)
    assert found["exit"] is None
    assert found["counts"]["PASSED"] == len(gpu.NEW_TESTS) + 2
    for name in gpu.NEW_TESTS:
        files, limit = runs.pop(f"pytest-{Path(name).stem}")
        assert files == [f"tests/{name}"]
        assert 20 <= limit <= 25
    for files, rest in runs.values():
        assert files
        assert not {Path(path).name for path in files} & set(gpu.NEW_TESTS)
        assert rest > 90


def test_new_kernels_have_the_time_to_start(gpu):
    assert [gpu.time_of_new(left) for left in (10.0, 60.0, 300.0)] == [10.0, 25.0, 60.0]


def test_calibration_is_kept_as_it_comes(gpu, monkeypatch, tmp_path):
    import gpu_calibrate

    monkeypatch.setattr(gpu_calibrate, "ROUNDS", 1)
    calibration = gpu_calibrate.Calibration(torch.device("cpu"), rehearse=True, path=tmp_path / "calibration.json")
    calibration.copy()
    kept = json.loads(calibration.path.read_text())
    assert [row["name"] for row in kept["calibration"]] == ["copy"]
    assert kept["ceilings"]["gbps"] > 0


def test_the_certificate_outlives_its_stage(gpu, monkeypatch, tmp_path):
    def parity(limit, rehearse, result):
        result["parity"] = [{"passed": True}]
        return {"ok": True, "broken": {}}

    def ended(limit):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "parity", parity)
    monkeypatch.setattr(gpu, "run_pytest", ended)
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.test(100, False, gpu.load(path), path)
    assert gpu.load(path)["parity"] == [{"passed": True}]


def test_a_run_that_is_ended_keeps_what_it_timed(gpu, monkeypatch, tmp_path):
    def run(command, *_, **__):
        if done:
            raise KeyboardInterrupt
        done.append(command)
        Path(command[2]).write_text(json.dumps({"rows": [{"p50_ms": 1.0}], "refused": [], "table": ""}))
        return 0, ""

    done = []
    monkeypatch.setattr(gpu, "run", run)
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.bench(100, SimpleNamespace(rehearse=True, jobs=""), gpu.load(path), path)
    assert [row["p50_ms"] for row in gpu.load(path)["rows"]] == [1.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the stages would run")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert "torch sees no CUDA device here" in done.stderr
