"""Weights in and out: what is read is right, what is wrong is refused by name, and nothing is left half done."""

import logging
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastvit.checkpoints import CheckpointError, convert_onnx, load_checkpoint, read_state_dict, save_checkpoint
from fastvit.foreign import read_npz, read_onnx_encoder
from fastvit.model import VisionTransformer, create_model
from fastvit.resample import resample_pos_embed
from fastvit.variants import VARIANTS

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = VisionTransformer(**{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin", "deep/er/w.safetensors"])
def test_what_is_saved_is_loaded(tmp_path, name):
    source, target = small(0), small(1)
    save_checkpoint(source, tmp_path / name)
    assert equal(read_state_dict(tmp_path / name), values(source))
    assert load_checkpoint(target, tmp_path / name) == ([], [])
    assert equal(values(target), values(source))
    assert list((tmp_path / name).parent.iterdir()) == [tmp_path / name], "no temporary is left"


def test_saved_file_has_the_usual_permissions(tmp_path):
    save_checkpoint(small(), tmp_path / "w.safetensors")
    (tmp_path / "plain").touch()
    assert os.stat(tmp_path / "w.safetensors").st_mode == os.stat(tmp_path / "plain").st_mode


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, source = tmp_path / "w.safetensors", small(0)
    save_checkpoint(source, path)

    def half_written(state, part, **_):
        with open(part, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(small(1), path)
    assert equal(read_state_dict(path), values(source))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("nest", ["state_dict", "model", "module.", "_orig_mod.", "_orig_mod.module."])
def test_training_checkpoints_are_unwrapped(tmp_path, nest):
    source, target = small(0), small(1)
    state = values(source)
    state = {nest + k: v for k, v in state.items()} if "." in nest else {nest: state, "epoch": 3, "lr": [0.1]}
    torch.save(state, tmp_path / "w.pth")
    load_checkpoint(target, tmp_path / "w.pth")
    assert equal(values(target), values(source))


def test_compiled_model_saves_and_loads_plain_keys(tmp_path):
    source, target = small(0), small(1)
    save_checkpoint(torch.compile(source), tmp_path / "w.safetensors")
    load_checkpoint(torch.compile(target), tmp_path / "w.safetensors")
    assert equal(values(target), values(source))


class RunsCode:
    """What a malicious pickle would hold."""

    def __reduce__(self):
        return (os.mkdir, ("pickle_ran",))


def bad_files(folder, state):
    """Files that cannot be read, and what the error says."""
    save_file(state, folder / "whole.safetensors")
    torch.save(state, folder / "whole.pth")
    for suffix in ("safetensors", "pth"):
        whole = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        (folder / f"empty.{suffix}").write_bytes(b"")
        (folder / f"text.{suffix}").write_text("not found\n")
    with open(folder / "code.pth", "wb") as file:
        pickle.dump({"model": RunsCode()}, file)
    torch.save({"model": RunsCode()}, folder / "code2.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "numbers.pth")
    (folder / "text.npz").write_text("not an archive")
    return {
        "cut.safetensors": "is no readable safetensors file, or it is truncated",
        "empty.safetensors": "is no readable safetensors file",
        "text.safetensors": "is no readable safetensors file",
        "cut.pth": "is no readable PyTorch file",
        "empty.pth": "is no readable PyTorch file",
        "text.pth": "no readable PyTorch file|refused",
        "code.pth": "refused",
        "code2.pth": "refused",
        "list.pth": "holds no state dict",
        "numbers.pth": "holds no state dict",
        "text.npz": "is no readable .npz file",
    }


def test_unreadable_files_are_refused_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small(0)
    before = values(model)
    for name, words in bad_files(tmp_path, values(small(1))).items():
        with pytest.raises(CheckpointError, match=words) as caught:
            load_checkpoint(model, tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: there is no such file"):
        load_checkpoint(model, tmp_path / "gone.safetensors")
    assert not (tmp_path / "pickle_ran").exists(), "code inside a checkpoint ran"
    assert equal(values(model), before)


def drop(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("head.bias"), r"missing: head\.bias"),
        (lambda s: s | {"extra.weight": torch.zeros(2)}, r"not in the model: extra\.weight"),
        (lambda s: s | {"norm.weight": torch.zeros(31)}, r"norm\.weight has shape \(31,\), expected \(32,\)"),
        (lambda s: s | {"norm.weight": torch.zeros(32, dtype=torch.int64)}, r"norm\.weight is torch\.int64, expected"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 12, 32)}, r"pos_embed has shape \(1, 12, 32\), .* square grid"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 26, 16)}, r"pos_embed has shape \(1, 26, 16\), expected \(1, 17"),
        (lambda s: {k + ".x": v for k, v in s.items()}, "and 27 more"),
    ],
)
def test_misfits_are_named_and_change_nothing(tmp_path, change, words):
    model = small(0)
    before = values(model)
    save_file(change(values(small(1))), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(model, tmp_path / "w.safetensors")
    assert "w.safetensors" in str(caught.value)
    assert equal(values(model), before)


def test_not_strict_reports_what_it_left_out(tmp_path):
    model, source = small(0), small(1)
    state = drop("head.bias")(values(source)) | {"extra": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    bias = model.head.bias.clone()
    assert load_checkpoint(model, tmp_path / "w.safetensors", strict=False) == (["head.bias"], ["extra"])
    assert torch.equal(model.head.bias, bias)
    assert torch.equal(model.head.weight, source.head.weight)
    save_file(state | {"norm.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.bias has shape \(3,\)"):
        load_checkpoint(model, tmp_path / "w.safetensors", strict=False)


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"reg_tokens": 3}])
def test_position_table_is_resampled_and_said(tmp_path, caplog, options):
    source, target = small(0, **options), small(1, img_size=(24, 12), **options)
    save_checkpoint(source, tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO, logger="fastvit"):
        load_checkpoint(target, tmp_path / "w.safetensors")
    assert "resampled from 4 x 4 to 6 x 3 patches" in caplog.text
    prefix = 0 if options.get("no_embed_class") else 1 + options.get("reg_tokens", 0)
    assert torch.equal(target.pos_embed, resample_pos_embed(source.pos_embed, (6, 3), (4, 4), prefix))
    with pytest.raises(CheckpointError, match="pos_embed has shape"):
        load_checkpoint(small(1, img_size=24, **options), tmp_path / "w.safetensors", resize_pos_embed=False)


def test_position_table_is_resampled_as_timm_does(timm, tmp_path):
    name = "vit_tiny_patch16_224"
    save_checkpoint(create_model(name, depth=1, num_classes=0), tmp_path / "w.safetensors")
    arguments = {"depth": 1, "num_classes": 0, "img_size": 96}
    ours = create_model(name, checkpoint_path=tmp_path / "w.safetensors", **arguments)
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay(tmp_path), **arguments)
    assert equal(values(ours), values(theirs))


def overlay(folder):
    return {"file": str(folder / "w.safetensors"), "num_classes": 0}


def test_other_number_of_classes_starts_a_new_head(tmp_path, caplog):
    path, name = tmp_path / "w.safetensors", "test_vit"
    source = create_model(name, depth=1)
    save_checkpoint(source, path)
    for num_classes in (7, 0):
        model = create_model(name, depth=1, checkpoint_path=path, num_classes=num_classes)
        assert "the classifier does not fit" in caplog.text
        assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert torch.equal(create_model(name, depth=1, checkpoint_path=path).head.weight, source.head.weight)
    same = create_model(name, depth=1, checkpoint_path=path, num_classes=1000)
    assert torch.equal(same.head.weight, source.head.weight)
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(1000, 64\), expected \(7, 64\)"):
        load_checkpoint(create_model(name, depth=1, num_classes=7), path)


def test_timm_model_takes_a_checkpoint(timm, tmp_path):
    source, target = small(0), timm.models.VisionTransformer(**{**SMALL, "img_size": 24})
    save_checkpoint(source, tmp_path / "w.safetensors")
    load_checkpoint(target, tmp_path / "w.safetensors")
    source.set_input_size(24)
    assert equal(values(target), values(source))


def jax_arrays(layout, pool=False):
    """A tiny ViT as the published .npz files hold it; every value different."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    mha, mlp, norm2 = ("_1", "_3", "_2") if layout == "original" else ("_0", "_0", "_1")

    def block():
        heads = {
            f"MultiHeadDotProductAttention{mha}/{n}/{kind}": draw(*((32, 2, 16) if kind == "kernel" else (2, 16)))
            for n in ("query", "key", "value")
            for kind in ("kernel", "bias")
        }
        dense = {f"MlpBlock{mlp}/Dense_0/kernel": draw(32, 128), f"MlpBlock{mlp}/Dense_0/bias": draw(128)}
        dense |= {f"MlpBlock{mlp}/Dense_1/kernel": draw(128, 32), f"MlpBlock{mlp}/Dense_1/bias": draw(32)}
        norms = {f"LayerNorm{n}/{k}": draw(32) for n in ("_0", norm2) for k in ("scale", "bias")}
        out = f"MultiHeadDotProductAttention{mha}/out"
        return {**heads, **dense, **norms, f"{out}/kernel": draw(2, 16, 32), f"{out}/bias": draw(32)}

    blocks = [block(), block()]
    if layout == "stacked":
        body = {f"Transformer/encoderblock/{n}": torch.stack([b[n] for b in blocks]) for n in blocks[0]}
    else:
        body = {f"Transformer/encoderblock_{i}/{n}": a for i, b in enumerate(blocks) for n, a in b.items()}
    table = "Transformer/posembed_input/pos_embedding" if layout == "original" else "pos_embedding"
    body |= {"embedding/kernel": draw(4, 4, 3, 32), "embedding/bias": draw(32)}
    body |= {"Transformer/encoder_norm/scale": draw(32), "Transformer/encoder_norm/bias": draw(32)}
    body |= {"head/kernel": draw(32, 5), "head/bias": draw(5)}
    if pool:
        head = {n.replace("LayerNorm_1", "LayerNorm_0"): a for n, a in block().items()}
        body |= {f"MAPHead_0/{n}": a for n, a in head.items()} | {"MAPHead_0/probe": draw(1, 1, 32)}
    else:
        body["cls"] = draw(1, 1, 32)
    body[table] = draw(1, 16 if pool else 17, 32)
    return body


@pytest.mark.parametrize("layout", ["original", "big_vision", "stacked"])
@pytest.mark.parametrize("side", [16, 24])
def test_jax_weights_are_read_as_timm_reads_them(timm, tmp_path, layout, side):
    np, path = pytest.importorskip("numpy"), tmp_path / "w.npz"
    prefix = "" if layout == "original" else "params/"
    np.savez(path, **{prefix + name: array.numpy() for name, array in jax_arrays(layout).items()})
    theirs = timm.models.VisionTransformer(**{**SMALL, "img_size": side})
    theirs.load_pretrained(str(path))
    ours = small(0, img_size=side)
    ours.load_pretrained(path)
    for key, value in values(theirs).items():
        if key != "pos_embed" or side == 16:  # timm resizes these files' tables bilinearly, all others bicubically
            assert torch.equal(value, ours.state_dict()[key]), key
    again = small(1, img_size=side)
    load_checkpoint(again, path)
    assert equal(values(again), values(ours))


def test_jax_pooling_head_is_read_as_timm_reads_it(timm, tmp_path):
    np, options = pytest.importorskip("numpy"), {"global_pool": "map", "class_token": False}
    arrays = {f"params/{n}": a.numpy() for n, a in jax_arrays("stacked", pool=True).items()}
    np.savez(tmp_path / "w.npz", **arrays)
    theirs, ours = timm.models.VisionTransformer(**SMALL, **options), small(0, **options)
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    ours.load_pretrained(tmp_path / "w.npz")
    assert equal(values(ours), values(theirs))
    del arrays["params/embedding/bias"]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"w\.npz: has no array params/embedding/bias"):
        read_npz(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", weights=np.zeros(3))
    with pytest.raises(CheckpointError, match="has no array embedding/kernel or"):
        read_npz(tmp_path / "w.npz")


ONNX_NAMES = {
    "norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2", "ls1": "layer_scale1", "ls2": "layer_scale2",
}  # fmt: skip


def onnx_graph(onnx, state, depth):
    """The nodes and initialisers with which an exporter writes this encoder; matrices anonymous and transposed."""
    nodes, arrays = [], {}

    def use(op, node, name, tensor, index=1):
        arrays[name] = tensor
        inputs = ["x"] * index + [name]
        nodes.append(onnx.helper.make_node(op, inputs, [f"{node}_out{len(nodes)}"], name=node))

    def named(op, path, kind, key, index=1):
        use(op, f"/backbone/{path}/{op}", f"backbone.{path.replace('/', '.')}.{kind}", state[key], index)

    use("Expand", "/backbone/embeddings/Expand", "backbone.embeddings.cls_token", state["cls_token"], 0)
    for i, kind in ((1, "weight"), (2, "bias")):
        named("Conv", "embeddings/patch_embeddings/projection", kind, f"patch_embed.proj.{kind}", i)
    use("Concat", "/backbone/embeddings/Concat_6", "onnx::Concat_1", state["pos_embed"][:, :1], 0)
    use("Reshape", "/backbone/embeddings/Reshape_1", "onnx::Reshape_2", state["pos_embed"][:, 1:], 0)
    for kind, op in (("weight", "Mul"), ("bias", "Add")):
        named(op, "layernorm", kind, f"norm.{kind}")
    for i in range(depth):
        at, block = f"/backbone/encoder/layer.{i}", f"blocks.{i}"
        for key, path in ONNX_NAMES.items():
            node = f"{at}/{path.replace('attention.output.', 'attention/output/').replace('mlp.', 'mlp/')}"
            name = f"backbone.encoder.layer.{i}.{path}"
            if "ls" in key:
                use("Mul", f"{node}/Mul", f"{name}.lambda1", state[f"{block}.{key}.gamma"])
                continue
            use("Add", f"{node}/Add", f"{name}.bias", state[f"{block}.{key}.bias"])
            if "norm" in key:
                use("Mul", f"{node}/Mul", f"{name}.weight", state[f"{block}.{key}.weight"])
            else:
                use("MatMul", f"{node}/MatMul", f"onnx::MatMul_{len(nodes)}", state[f"{block}.{key}.weight"].t())
        for part, weight, bias in zip(
            ("query", "key", "value"),
            state[f"{block}.attn.qkv.weight"].chunk(3),
            state[f"{block}.attn.qkv.bias"].chunk(3),
            strict=True,
        ):
            node = f"{at}/attention/attention/{part}"
            use("MatMul", f"{node}/MatMul", f"onnx::MatMul_{len(nodes)}", weight.t())
            use("Add", f"{node}/Add", f"backbone.encoder.layer.{i}.attention.attention.{part}.bias", bias)
    use("Conv", "/decoder/conv/Conv", "decoder.conv.weight", torch.zeros(3))
    return nodes, arrays


def write_onnx(onnx, path, nodes, arrays):
    tensors = [onnx.numpy_helper.from_array(a.contiguous().numpy(), name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "encoder", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), str(path))


@pytest.fixture
def encoder(monkeypatch):
    """A two-block variant small enough to export here, and its random weights."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: nothing to convert")
    arguments = {**SMALL, "init_values": 0.1}
    del arguments["num_classes"]
    tiny = type(VARIANTS["test_vit"])(arguments, 0, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(VARIANTS, "tiny_dinov2", tiny)
    state = values(small(0, init_values=0.1, num_classes=0))
    return onnx, state, *onnx_graph(onnx, state, depth=2)


def test_onnx_encoder_is_converted_whole(tmp_path, encoder):
    onnx, state, nodes, arrays = encoder
    write_onnx(onnx, tmp_path / "e.onnx", nodes, arrays)
    converted = convert_onnx(tmp_path / "e.onnx", tmp_path / "e.safetensors", model="tiny_dinov2")
    assert equal(dict(sorted(converted.items())), dict(sorted(state.items())))
    model = create_model("tiny_dinov2", checkpoint_path=tmp_path / "e.safetensors")
    assert equal(values(model), state)
    assert equal(read_state_dict(tmp_path / "e.onnx"), converted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", r"the encoder has no weight backbone\.encoder\.layer\.1\.mlp\.fc2\.bias"),
        ("unknown", "the encoder has weights that are not understood: .*Where"),
        ("shape", r"norm\.weight has shape \(31,\), expected \(32,\)"),
        ("twice", "two different initialisers stand for"),
        ("other", "has no encoder, expected nodes named /backbone/"),
        ("depth", r"missing: blocks\.1\."),
        ("text", "is no readable ONNX file"),
    ],
)
def test_onnx_encoder_with_anything_else_is_refused(tmp_path, encoder, change, words):
    onnx, _, nodes, arrays = encoder
    lost = "backbone.encoder.layer.1.mlp.fc2.bias"
    if change == "missing":
        del arrays[lost]
    elif change == "unknown":
        arrays["onnx::Where_9"] = torch.zeros(2)
        nodes.append(onnx.helper.make_node("Where", ["onnx::Where_9"], ["w"], name="/backbone/encoder/Where"))
    elif change == "shape":
        arrays["backbone.layernorm.weight"] = torch.zeros(31)
    elif change == "twice":
        arrays["onnx::MatMul_x"] = torch.zeros(32, 32)
        name = "/backbone/encoder/layer.0/attention/attention/query/MatMul"
        nodes.append(onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_x"], ["w"], name=name))
    elif change == "other":
        nodes = [node for node in nodes if "/decoder/" in node.name]
    elif change == "depth":
        nodes = [node for node in nodes if "layer.1" not in node.name]
    write_onnx(onnx, tmp_path / "e.onnx", nodes, arrays)
    if change == "text":
        (tmp_path / "e.onnx").write_text("not a graph")
    with pytest.raises(CheckpointError, match=words):
        convert_onnx(tmp_path / "e.onnx", tmp_path / "e.safetensors", model="tiny_dinov2")
    assert not (tmp_path / "e.safetensors").exists()


def test_onnx_missing_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'fastvit\[convert\]'"):
        read_onnx_encoder(tmp_path / "e.onnx")
