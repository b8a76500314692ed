"""The benchmark library: what it counts, what it refuses, and the form of what it returns."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cuda_on_cpu
import pytest
import torch

from fastvit import bench, ops
from fastvit.bench import stock, timing
from fastvit.bench.costs import model_flops, op_cost
from fastvit.model import create_model
from fastvit.testing import VIT_SHAPES, assert_op_as_accurate, make_inputs
from fastvit.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
BASE = VIT_SHAPES["base"]


def command(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results_check():
    return command("results_check")


@pytest.mark.parametrize(
    ("op", "gflop", "mb"),
    [
        ("layernorm_linear", 178.5, 313),
        ("attention", 30.5, 310),
        ("attention_varlen", 30.5 * (1 + (98 / 197) ** 2) / 2, 310 * (1 + 98 / 197) / 2),
        ("linear_residual", 59.5, 234),
        ("layernorm_mlp", 476.0, 862),
    ],
)
def test_costs_of_one_layer_at_batch_256(op, gflop, mb):
    cost = op_cost(op, BASE, 256, itemsize=2)
    assert cost.flops / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert cost.bytes / 1e6 == pytest.approx(mb, rel=3e-3)


def test_whole_model_is_35_gflop_an_image():
    assert model_flops(BASE, 12, 1) / 1e9 == pytest.approx(35.1, rel=2e-3)
    assert model_flops(BASE, 12, 1, "train") == 3 * model_flops(BASE, 12, 1)


@pytest.mark.parametrize("op", bench.OPS)
def test_stock_ops_mean_what_the_reference_means(op):
    inputs = make_inputs(op, VIT_SHAPES["tiny"], 2, torch.float32)
    assert_op_as_accurate(op, getattr(stock, op), inputs)


PLAIN = (  # one of each kind
    "vit_tiny_patch16_224",
    "vit_base_patch16_224_miil",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch32_clip_quickgelu_224",
    "vit_base_patch32_siglip_gap_256",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_base_patch16_radio_v3",
    "eva_large_patch14_196",
)
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}


@pytest.mark.parametrize("name", PLAIN)
def test_stock_model_computes_what_fastvit_computes(name):
    torch.manual_seed(0)
    side = 4 * int(name.split("patch")[1][:2])
    model = create_model(name, img_size=side, **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    baseline = stock.VisionTransformer(model)
    baseline.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(baseline(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_model_without_a_head_is_timed(monkeypatch, mode):
    monkeypatch.setitem(VARIANTS, "features", replace(VARIANTS["test_vit"], num_classes=0))
    result = bench.run(models=["features"], batch=2, rounds=1, device="cpu", mode=mode)
    assert not result["refused"]
    assert [row["provider"] for row in result["rows"]] == ["fastvit", "eager"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_siglip_224", "global_pool is 'map'"),
        ("vit_giant_patch14_dinov2", "an MLP is gated"),
        ("aimv2_large_patch14_224", "a norm is no LayerNorm"),
        ("beit3_base_patch16_224", "an attention is gated or normalised inside"),
    ],
)
def test_a_model_that_is_not_plain_is_refused_by_name(monkeypatch, name, reason):
    model = create_model(name, **SMALL)
    with pytest.raises(ValueError, match=reason):
        stock.VisionTransformer(model)
    monkeypatch.setattr(bench.model_case, "create_model", lambda _: model)
    with pytest.raises(ValueError, match=f"bench: {name} is not one of the plain ViTs that are timed: .*{reason}"):
        bench.run(models=[name], device="cpu")


@pytest.mark.parametrize("mode", ["fwd", "bwd", "full"])
def test_rows_of_an_op_have_the_committed_form(mode):
    result = bench.run(["linear_residual"], batch=1, mode=mode, rounds=2, shape="tiny", device="cpu")
    result = json.loads(json.dumps(result))
    assert not result["refused"]
    assert [row["provider"] for row in result["rows"]] == ["fastvit", "eager"]
    assert not list(results_check().check(result))
    ours, eager = result["rows"]
    assert eager["ratio_to_eager"] == 1.0
    assert ours["ratio_to_eager"] == pytest.approx(torch.tensor(ours["ratios_to_eager"]).quantile(0.5).item(), rel=1e-6)
    assert ours["error"] < 1e-5


def test_rows_of_a_model_have_the_committed_form():
    result = bench.run(models=["vit_tiny_patch16_224"], batch=1, rounds=1, device="cpu", dtype="bf16")
    assert not result["refused"]
    assert not list(results_check().check(json.loads(json.dumps(result))))
    assert all(row["held_mb"] is None or row["held_mb"] >= 0 for row in result["rows"])
    assert result["rows"][0]["images_per_s"] == pytest.approx(1000 / result["rows"][0]["p50_ms"])


def test_attention_of_another_backend_is_a_provider():
    """On a CPU it is missing, which is no fault of its results."""
    case = {"providers": ["fastvit-cuda-attention"], "batch": 1, "rounds": 1, "device": "cpu", "shape": "tiny"}
    for what in ({"ops": ["attention_packed"]}, {"models": ["vit_tiny_patch16_224"]}):
        (refused,) = bench.run(**case, **what)["refused"]
        assert refused["missing"]
        assert "attention_packed: backend 'cuda' cannot run this call" in refused["reason"]
    (refused,) = bench.run(**case, ops=["patch_embed"])["refused"]
    assert refused["reason"] == "fastvit-cuda-attention is for attention_packed and models"


@pytest.mark.parametrize("provider", ["onnxruntime", "openvino"])
def test_a_peer_that_is_not_installed_is_reported(monkeypatch, provider):
    monkeypatch.setattr(bench.runtimes.importlib.util, "find_spec", lambda name: None)
    case = {"models": ["vit_tiny_patch16_224"], "batch": 1, "rounds": 1, "device": "cpu"}
    result = bench.run(**case, providers=["fastvit", provider])
    (entry,) = result["refused"]
    assert entry["missing"]
    assert entry["reason"] == f"{provider} is not installed (pip install 'fastvit[peers]')"
    (refused,) = bench.run(**case, mode="train", providers=[provider])["refused"]
    assert refused["reason"] == f"{provider} is compared for infer on a CPU only"


def test_lean_memory_is_a_provider_of_training(monkeypatch):
    case = {"models": ["vit_tiny_patch16_224"], "batch": 1, "rounds": 1, "device": "cpu"}
    asked, lean = [], bench.model_case.accelerate
    monkeypatch.setattr(bench.model_case, "accelerate", lambda model, **kw: asked.append(kw) or lean(model, **kw))
    (row,) = bench.run(**case, mode="train", providers=["fastvit-lean"])["rows"]
    assert row["provider"] == "fastvit-lean"
    assert asked == [{"memory": "lean"}]
    (refused,) = bench.run(**case, providers=["fastvit-lean"])["refused"]
    assert "for train only" in refused["reason"]


@pytest.mark.parametrize("provider", ["onnxruntime", "openvino"])
def test_a_peer_computes_the_same_model(provider):
    pytest.importorskip(provider, reason=f"{provider} is not installed")
    result = bench.run(
        models=["vit_tiny_patch16_224"], batch=1, rounds=1, device="cpu", providers=["fastvit", "eager", provider]
    )
    assert not [entry for entry in result["refused"] if not entry["missing"]]
    ours = result["rows"][0]
    assert ours["best_peer"] in ("eager", provider)
    assert ours["ratio_to_best_peer"] > 0


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_a_wrong_result_is_refused_not_timed(monkeypatch, mode):
    right = ops.linear_residual
    monkeypatch.setattr(ops, "linear_residual", lambda x, *args, **kwargs: right(1.001 * x, *args, **kwargs))
    result = bench.run(["linear_residual"], batch=1, mode=mode, rounds=1, shape="tiny", device="cpu")
    assert [row["provider"] for row in result["rows"]] == ["eager"]
    (refusal,) = result["refused"]
    assert refusal["provider"] == "fastvit"
    assert "max error" in refusal["reason"]


def test_a_wrong_gradient_alone_is_refused_in_bwd(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    right = ops.linear_residual
    monkeypatch.setattr(ops, "linear_residual", lambda x, *args, **kwargs: right(Wrong.apply(x), *args, **kwargs))
    arguments = {"ops": ["linear_residual"], "batch": 1, "rounds": 1, "shape": "tiny", "device": "cpu"}
    assert not bench.run(**arguments, mode="fwd")["refused"]
    (refusal,) = bench.run(**arguments, mode="bwd")["refused"]
    assert refusal["reason"].startswith("grad_x")


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "linear_residual", lambda x, *_, residual, **__: residual * float("nan"))
    (refusal,) = bench.run(["linear_residual"], batch=1, rounds=1, shape="tiny", device="cpu")["refused"]
    assert "not finite" in refusal["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["mlp"]}, "bench: op is 'mlp'"),
        ({"providers": ["stock"]}, "bench: provider is 'stock'"),
        ({"mode": "infer"}, "bench: mode is 'infer'"),
        ({"dtype": "int8"}, "bench: dtype is 'int8'"),
        ({"shape": "giant"}, "bench: shape is 'giant'"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**{"ops": ["attention"], "device": "cpu"} | arguments)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    bench.run(["linear_residual"], batch=1, rounds=1, shape="tiny", device="cpu", threads=1)
    assert torch.get_num_threads() == before


def test_rounds_interleave_and_change_order():
    order = []
    candidates = [timing.Candidate(name, lambda _, name=name: order.append(name)) for name in "ab"]
    timing.interleave(candidates, 2, torch.device("cpu"))
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(runs) == "ababa"  # warm-up a, b; round one a, b; round two b, a


def test_only_the_call_is_on_the_clock():
    candidate = timing.Candidate("x", lambda state: time.sleep(0.001), lambda: time.sleep(0.02))
    (rounds,) = timing.interleave([candidate], 1, torch.device("cpu"))
    assert max(sample for samples in rounds for sample in samples) < 15


def test_percentiles_are_numpys():
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    for share in (0.2, 0.5, 0.8):
        expected = torch.tensor(values, dtype=torch.float64).quantile(share).item()
        assert timing.percentile(values, share) == pytest.approx(expected)


def test_a_broken_result_file_is_caught():
    check = results_check().check
    row = {"op": "attention", "provider": "fastvit", "mode": "fwd", "dtype": "float32", "batch": 1, "error": 1e-7}
    row |= dict.fromkeys(("tflops", "gbps", "peak_mb", "ceiling_share"), 1.0)
    row |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "raw_ms": [[1.0, 2.0, 3.0]]}
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "python", "commit", "date"), "x")
    eager = row | {"provider": "eager"}
    assert not list(check({"machine": machine, "rows": [row, eager]}))
    assert any("no eager row" in problem for problem in check({"machine": machine, "rows": [row]}))
    assert any("error is null" in p for p in check({"machine": machine, "rows": [row | {"error": None}, eager]}))
    assert any("not in order" in p for p in check({"machine": machine, "rows": [row | {"p20_ms": 5.0}, eager]}))
    assert any("raw_ms" in p for p in check({"machine": machine, "rows": [row | {"raw_ms": [[9.0]]}, eager]}))
    assert any("commit" in problem for problem in check({"machine": machine | {"commit": None}, "rows": [row, eager]}))

    row = {"form": "plain", "dtype": "float32", "tokens": 197, "dim": 64, "tensor": "output", "passed": True}
    row |= dict.fromkeys(("rms_error", "rms_error_stock", "max_error", "max_error_stock"), 1e-7)
    table = {"machine": machine, "kind": "accuracy", "passed": True, "rows": [row]}
    assert not list(check(table))
    assert any("finite" in p for p in check(table | {"rows": [row | {"max_error": float("nan")}]}))
    assert any("no tensor" in p for p in check(table | {"rows": [{k: v for k, v in row.items() if k != "tensor"}]}))
    assert any("say otherwise" in p for p in check(table | {"rows": [row | {"passed": False}]}))

    row = {"op": "block", "mode": "infer", "eager": 98.0, "cpp": 85.5}
    table = {"machine": machine, "kind": "host", "rows": [row]}
    assert not list(check(table))
    assert not list(check(table | {"rows": [{"op": "block by ops", "mode": "infer", "cuda": 98.0}]}))
    assert any("positive" in problem for problem in check(table | {"rows": [row | {"cuda": 0.0}]}))
    assert any("positive" in problem for problem in check(table | {"rows": [{"op": "block", "mode": "infer"}]}))
    assert any("kind is 'speed'" in problem for problem in check(table | {"kind": "speed"}))


def test_the_tables_show_variants_beside_their_stock():
    """A graph beside eager's graph, lean beside eager; a provider without its stock is left out."""
    row = {"model": "vit", "mode": "train", "dtype": "float32", "batch": 1, "job": "train"}
    times = {"fastvit": 2.0, "eager": 4.0, "fastvit-lean": 3.0, "fastvit-graph": 1.0, "compile": 3.5}
    rows = [row | {"provider": name, "p50_ms": time, "raw_ms": [[time]]} for name, time in times.items()]
    rows = [each | {"peak_mb": 1.0, "error": 1.0} for each in rows]
    script = command("results")
    found = {case["fastvit"]["mode"]: script.line(case) for case in script.cases(rows)}
    assert set(found) == {"train", "train, lean"}
    assert found["train"][4:9] == ["4", "3.5 compile", "2", "2.00x", "1.75x"]
    assert found["train, lean"][4:9] == ["4", "-", "3", "1.33x", "-"]
    device = {"cases": [*script.cases(rows), {"fastvit": {"op": "attention"}}]}
    assert len(script.headlines(device)["cases"]) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_peak_memory_sees_a_large_temporary():
    candidate = timing.Candidate("x", lambda _: torch.ones(64 << 20).sum())
    assert 256 < timing.peak_mb(candidate, torch.device("cpu")) < 300


def test_roofline_of_attention_is_bound_by_memory(capsys):
    assert command("roofline").main(["--shape", "base", "--ops", "attention_packed", "--json"]) == 0
    forward, backward = json.loads(capsys.readouterr().out)["rows"]
    assert forward["bound"] == backward["bound"] == "memory"
    assert forward["floor_us"] == pytest.approx(72, rel=0.01)
    assert backward["floor_us"] == pytest.approx(144, rel=0.01)
    assert command("roofline").main(["--shape", "base", "--ops", "attention_packed", "--tbs", "1000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["floor_us"] == pytest.approx(30.5e3 / 788, rel=0.01)


def test_roofline_names_what_it_does_not_know():
    with pytest.raises(SystemExit, match="--ops is 'fc1', expected some of patch_embed"):
        command("roofline").main(["--ops", "fc1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tuning_says_that_it_needs_a_gpu(capsys):
    pytest.importorskip("triton", reason="triton is not installed")
    assert command("tune_attention").main([]) == 2
    assert "needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tuning_candidates_cover_their_lengths_and_become_the_settings(dtype, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    tune = command("tune_attention")
    for kernel in tune.KERNELS:
        for dim, tokens in ((64, 197), (64, 577), (80, 257)):
            found = tune.candidates(kernel, dtype, dim, tokens, 90)
            assert found[0] == tune.attention_settings(kernel, dtype, dim, tokens, 90)
            assert len(found) == len(set(found)) > 10
            for choice in found:
                assert sum(choice.cols) >= dim
                first, last = tune.first_and_last(choice, tokens)
                assert first <= tokens <= last
    name = str(dtype).removeprefix("torch.")
    table = {}
    exec("ATTENTION_MEASURED = {" + tune.entry((90, "fwd", name, 64), [(193, 208, found[-1])]) + "}", vars(tune), table)
    rule = [tune.attention_settings("fwd", dtype, 64, keys, 90) for keys in (192, 209)]
    monkeypatch.setattr(tune._configs, "ATTENTION_MEASURED", table["ATTENTION_MEASURED"])
    assert [tune.attention_settings("fwd", dtype, 64, keys, 90) for keys in (193, 208)] == [found[-1]] * 2
    assert [tune.attention_settings("fwd", dtype, 64, keys, 90) for keys in (192, 209)] == rule
    assert tune.attention_settings("fwd", dtype, 64, 200, 80) != found[-1]
    assert tune.attention_settings("fwd", dtype, 64, 200, 90, general=True) != found[-1]


@pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not())
def test_the_hosts_time_can_be_measured(tmp_path):
    """In a process of its own: the glue that it builds registers the ops of other tests."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = "import host; host.ROUNDS = host.CALLS = 1; host.main()"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    command = [sys.executable, "-c", code, "--json", str(tmp_path / "host.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {
        row["op"]: row for row in json.loads((tmp_path / "host.json").read_text())["rows"] if row["mode"] == "infer"
    }
    assert all(rows[name][way] > 0 for name in ("block", "class token") for way in ("eager", "cpp", "cuda"))
