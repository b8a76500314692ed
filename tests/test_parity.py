"""The certificate of a whole model: what stock's error is, and that a wrong model does not get one."""

from contextlib import contextmanager

import pytest
import torch

from fastvit import VisionTransformer, dispatch, fused, parity
from fastvit.layers import SwiGLU
from fastvit.relabel import OUTPUT, embed_axes, orders, relabel, relabelled

SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}
CONFIGS = {
    "vit": {},
    "features": {"num_classes": 0},
    "registers": {"reg_tokens": 3, "init_values": 0.3},
    "norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "pre_norm": True},
    "map": {"global_pool": "map", "class_token": False},
    "average": {"global_pool": "avg"},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": torch.nn.SiLU},
}


def build(**kwargs):
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(count=2):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_another_order_of_the_channels_is_the_same_model(name):
    model, pixels = build(**CONFIGS[name]).double(), images().double()
    axes = embed_axes(model)
    order = orders(model, axes, 2)[1]
    assert not torch.equal(order, torch.arange(48))
    with dispatch.use_backend("reference"):
        expected = parity.output_and_gradients(model, pixels)
        found = parity.output_and_gradients(relabelled(model, axes, order), pixels, axes[OUTPUT], order)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        back = relabel(value, axes[key.removeprefix("grad_")], order.argsort())
        torch.testing.assert_close(back, expected[key], rtol=1e-9, atol=1e-12, msg=key)


def test_stocks_error_is_the_largest_of_its_equal_runs():
    rows = parity.model_rows(build(), images(), torch.float32)
    assert {row["stock_runs"] for row in rows} == {parity.STOCK_RUNS}
    assert len(rows) == 1 + len(list(build().parameters()))
    model, exact = build(), build().double()
    with dispatch.use_backend("reference"):
        exact = parity.output_and_gradients(exact, images().double())
    with dispatch.use_backend("torch"):
        stock = parity.output_and_gradients(model, images())
    for row in rows:
        alone = (stock[row["name"]].double() - exact[row["name"]]).abs().max().item()
        assert row["max_error_eager"] >= alone * (1 - 1e-6), row["name"]
    assert all(row["passed"] for row in rows)


def test_a_model_with_other_parameters_is_measured_as_it_is():
    model = build()
    model.head = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Linear(48, 7))
    assert embed_axes(model) is None
    rows = parity.model_rows(model, images(), torch.float32)
    assert {row["stock_runs"] for row in rows} == {1}
    assert any(row["name"] == "grad_head.1.weight" for row in rows)


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float32, 1.0001), (torch.bfloat16, 1.1)])
def test_a_wrong_model_gets_no_certificate(dtype, wrong, monkeypatch):
    """A wrong softmax scale, in our run only. (Errors that bfloat16 hides in a whole model show in the ops' rows.)"""
    right, recording = fused.attention_packed, parity.recording

    @contextmanager
    def our_run():
        with recording() as calls, monkeypatch.context() as patch:
            patch.setattr(
                fused, "attention_packed", lambda *args, scale, **rest: right(*args, scale=scale * wrong, **rest)
            )
            yield calls

    model = build()
    with torch.no_grad():  # scores that differ
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    assert all(row["passed"] for row in parity.model_rows(model, images(), dtype))
    monkeypatch.setattr(parity, "recording", our_run)
    assert not all(row["passed"] for row in parity.model_rows(model, images(), dtype))


def test_a_relabelling_that_changes_the_model_is_an_error(monkeypatch):
    right = parity.relabelled

    def wrong(model, axes, order):
        changed = right(model, axes, order)
        with torch.no_grad():
            changed.head.weight.mul_(1.001)
        return changed

    monkeypatch.setattr(parity, "relabelled", wrong)
    with pytest.raises(RuntimeError, match="computes something else"):
        parity.model_rows(build(), images(), torch.float32)
