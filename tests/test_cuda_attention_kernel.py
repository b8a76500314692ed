"""Hopper's attention forward with Triton's backward. Needs CUDA, or TRITON_INTERPRET=1 and the model of Hopper."""

import cuda_on_cpu
import pytest
from hopper_attention import HAS_KERNEL, packed, stand_in

import fastvit
from fastvit import _extension, dispatch, reference, testing

ON_MODEL = _extension.TRITON_INTERPRETED and not cuda_on_cpu.why_not()
pytestmark = pytest.mark.skipif(
    bool(_extension.why_not_triton()) or not (HAS_KERNEL or ON_MODEL),
    reason="needs a GPU of capability 9.0, or TRITON_INTERPRET=1 and nvcc's headers",
)


@pytest.mark.parametrize(("tokens", "dim"), [(3, 64), (65, 64), (197, 64), (70, 80)])
def test_the_backward_is_tritons(monkeypatch, tokens, dim):
    """Forward and gradients of the op that users call, with the kernel's statistics in Triton's backward."""
    if not HAS_KERNEL:
        stand_in(monkeypatch)
    qkv = packed(2, tokens, 2, device="cuda" if HAS_KERNEL else "cpu", dim=dim)
    with fastvit.use_backend(attention_packed="cuda", attention="cuda"):
        packed_inputs = {"qkv": qkv.requires_grad_(), "num_heads": 2}
        testing.assert_op_as_accurate("attention_packed", fastvit.ops.attention_packed, packed_inputs)
        heads = (t.detach().contiguous().requires_grad_() for t in reference.unpack_qkv(qkv, 2))
        inputs = dict(zip("qkv", heads, strict=True))
        testing.assert_op_as_accurate("attention", fastvit.ops.attention, inputs)
        with dispatch.recording() as calls:
            fastvit.ops.attention_packed(**packed_inputs)
    assert calls == [("attention_packed", "cuda")]
