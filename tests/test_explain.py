"""fastvit.explain: what it says is what is run."""

import pytest
import torch
from tiny_vits import build, images, one_thread
from torch import nn

from fastvit import _extension, accelerate, clear_pack_cache, dispatch, explain


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def test_explain_says_what_runs():
    model = build()
    assert not any(row.fused for row in explain(model).rows)
    rows = {(row.module, row.part): row for row in explain(accelerate(model, backend="torch")).rows}
    ops = ("layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp")
    expected = [("", "patch_embed"), ("", "class token only"), *((f"blocks.{i}", op) for i in range(2) for op in ops)]
    assert list(rows) == expected
    assert all(row.fused and not row.reasons for row in rows.values())
    assert {row.backend for row in rows.values()} == {"torch", ""}
    assert "triton" in rows["blocks.0", "attention_packed"].refused
    assert "blocks.0 .. 1" in str(explain(model))
    with dispatch.recording() as calls:
        model(images())
    assert {op for op, _ in calls} >= {op for op in ops if op != "attention_packed"}


def test_explain_matches_what_runs():
    """The backends that explain names are those that the ops are then run on."""
    model = accelerate(build(global_pool="avg"))
    said = {row.part: row.backend for row in explain(model).rows if row.fused}
    with dispatch.recording() as calls, torch.no_grad():
        model(images())
    assert dict(calls) == said


EXPLAINED = {
    "norm1": ("blocks.0.norm1", {"layernorm_linear"}),
    "qkv": ("blocks.0.attn.qkv", {"layernorm_linear"}),
    "attention": ("blocks.0.attn", {"layernorm_linear", "attention_packed", "linear_residual"}),
    "proj": ("blocks.0.attn.proj", {"linear_residual"}),
    "drop_path": ("blocks.0.drop_path1", {"linear_residual"}),
    "fc1": ("blocks.0.mlp.fc1", {"layernorm_mlp"}),
    "norm2": ("blocks.0.norm2", {"layernorm_mlp"}),
    "ls2": ("blocks.0.ls2", {"layernorm_mlp"}),
    "patches": ("patch_embed.proj", {"patch_embed"}),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain_names_the_part_that_is_not_fused(case):
    path, parts = EXPLAINED[case]
    model = accelerate(build(init_values=0.5))
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    rows = [row for row in explain(model).rows if not row.fused and row.module in ("", "blocks.0")]
    assert {row.part for row in rows} == parts
    assert all("has hooks" in row.reasons[0] for row in rows)
    assert "has hooks" in str(explain(model))


def test_explain_keeps_quiet():
    """explain runs nothing: no hook fires, no random number is drawn."""
    model, calls = accelerate(build(drop_path_rate=0.1)).train(), []
    nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1)).remove()
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    str(explain(model))
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


def test_norms_of_q_and_k_belong_to_the_attention():
    model = accelerate(build(qk_norm=True, global_pool="avg"))
    (row,) = [row for row in explain(model).rows if row.module == "blocks.0" and row.part == "attention_packed"]
    assert row.fused
    assert row.note == "with attn.q_norm and attn.k_norm"
    with dispatch.recording() as calls:
        model.blocks[0](torch.randn(1, 3, 64))
    assert [op for op, _ in calls] == ["layernorm_linear", "attention_packed", "linear_residual", "layernorm_mlp"]


def test_explain_names_what_runs_instead(timm):
    model = accelerate(build(qk_norm=True, mlp_layer=timm.layers.SwiGLUPacked, global_pool="avg"))
    model.blocks[0].attn.k_norm = nn.Softmax(dim=-1)
    rows = {row.part: row for row in explain(model).rows if row.module == "blocks.0"}
    assert list(rows) == ["layernorm_linear", "attention", "linear_residual", "layernorm_mlp"]
    assert rows["attention"].fused
    assert rows["attention"].note.startswith("attn.k_norm is a Softmax")
    assert rows["layernorm_mlp"].backend == "parts"
    with dispatch.recording() as calls:
        model.blocks[0](torch.randn(1, 3, 64))
    attention = ["layernorm_linear", "attention", "linear_residual"]
    assert [op for op, _ in calls] == [*attention, "layernorm_linear", "linear_residual"]


def test_explain_under_autocast():
    model = accelerate(build())
    with torch.autocast("cpu", torch.bfloat16):
        rows = explain(model).rows
    assert all(row.fused for row in rows)


def test_explain_in_a_wrapper():
    names = [row.module for row in explain(accelerate(nn.Sequential(nn.Identity(), build()))).rows]
    assert names[0] == "1"
    assert "1.blocks.0" in names


@pytest.mark.skipif(_extension.cpp() is None, reason="the C++ extension is not built")
def test_explain_counts_packed_weights():
    """Per part and in all; a pack goes with its model, and none is kept where that was asked for."""
    clear_pack_cache()
    model = accelerate(build(global_pool="avg")).eval()
    assert not any(row.pack_bytes for row in explain(model).rows)
    assert "packed weights" not in str(explain(model))
    with torch.no_grad():
        model(images())
    report = explain(model)
    packed = {row.part: row.pack_bytes for row in report.rows if row.module in ("", "blocks.0")}
    assert packed == {
        "patch_embed": 4 * 64 * 3 * 8 * 8,
        "class token only": 0,
        "layernorm_linear": 4 * 64 * 192,
        "attention_packed": 0,
        "linear_residual": 4 * 64 * 64,
        "layernorm_mlp": 2 * 4 * 64 * 256,
    }
    total = sum(row.pack_bytes for row in report.rows)
    assert f"packed weights kept: {total / 2**20:.1f} MB of this model, {total / 2**20:.1f} MB in all" in str(report)
    clear_pack_cache()
    with torch.no_grad():
        accelerate(model, keep_packs=False)(images())
    assert not any(row.pack_bytes for row in explain(model).rows)
    with torch.no_grad():
        accelerate(model)(images())
    del model
    assert _extension.cpp().pack_cache_info() == {"entries": 0, "bytes": 0}


@pytest.mark.skipif(_extension.cpp() is None, reason="the C++ extension is not built")
def test_unkept_packs_compile_in_one_graph():
    clear_pack_cache()
    model, x = accelerate(build(), keep_packs=False).eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert _extension.cpp().pack_cache_info()["entries"] == 0
