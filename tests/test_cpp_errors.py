"""Bad arguments of the compiled CPU ops: the message names the op, the tensor, the rule and what came."""

import pytest
import torch

from fastvit.testing import Shape, make_inputs

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")
SHAPE = Shape(16, 1, 32, 5)


def layernorm_mlp(act="gelu", row_scale=None, **changed):
    inputs = {name: value.detach() for name, value in make_inputs("layernorm_mlp", SHAPE, 2, torch.float32).items()}
    return C.layernorm_mlp_fwd(*(inputs | changed).values(), row_scale, act, 1e-6, True, False, False)


def layernorm_linear(**changed):
    inputs = {name: value.detach() for name, value in make_inputs("layernorm_linear", SHAPE, 2, torch.float32).items()}
    return C.layernorm_linear_fwd(*(inputs | changed).values(), 1e-6, False)


def linear_residual(row_scale=None, **changed):
    inputs = {name: value.detach() for name, value in make_inputs("linear_residual", SHAPE, 2, torch.float32).items()}
    return C.linear_residual_fwd(*(inputs | changed).values(), row_scale, False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layernorm_mlp(act="relu"), "act is 'relu', expected one of 'gelu', 'gelu_tanh', 'quick_gelu'"),
        (lambda: layernorm_mlp(fc1_weight=torch.zeros(32, 17)), r"fc1_weight has shape \(32, 17\), expected \(O, 16\)"),
        (lambda: layernorm_mlp(fc2_weight=torch.zeros(16, 31)), r"fc2_weight has shape \(16, 31\), expected"),
        (lambda: layernorm_mlp(fc2_weight=torch.zeros(16, 32).half()), "fc2_weight has dtype Half, expected Float"),
        (lambda: layernorm_mlp(fc1_bias=torch.zeros(16)), r"fc1_bias has shape \(16,\), expected \(32,\)"),
        (lambda: layernorm_mlp(layer_scale=torch.zeros(1)), r"layer_scale has shape \(1,\), expected \(16,\)"),
        (lambda: layernorm_mlp(row_scale=torch.ones(3)), r"row_scale has shape \(3,\), expected \(2,\)"),
        (lambda: layernorm_mlp(x=torch.zeros(2, 5, 16).double()), "x has dtype Double, expected float32, bfloat16"),
        (lambda: layernorm_mlp(x=torch.zeros(2, 5, 16, device="meta")), "x is on meta, expected the CPU"),
        (lambda: layernorm_linear(norm_bias=torch.zeros(5)), r"norm_bias has shape \(5,\), expected \(16,\) like x"),
        (lambda: layernorm_linear(x=torch.zeros(2, 5, 0)), r"x has shape \(2, 5, 0\), expected \(\.\.\., E\)"),
        (lambda: layernorm_linear(weight=torch.zeros(48)), r"weight has shape \(48,\), expected \(O, 16\)"),
        (lambda: linear_residual(residual=torch.zeros(2, 4, 16)), r"residual has shape \(2, 4, 16\), expected"),
        (lambda: linear_residual(bias=torch.zeros(2, 8)), r"bias has shape \(2, 8\), expected \(16,\)"),
    ],
)  # fmt: skip
def test_forward_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_backward_errors():
    inputs = {name: value.detach() for name, value in make_inputs("layernorm_mlp", SHAPE, 2, torch.float32).items()}
    x, nw, nb, w1, _, w2, b2, scale = inputs.values()
    stats, h = torch.zeros(10), torch.zeros(10, 32)

    def backward(dout=x, mean=stats, rstd=stats, h=h):
        return C.layernorm_mlp_bwd(dout, x, mean, rstd, h, nw, nb, w1, w2, b2, scale, None, "gelu", True, [True] * 8)

    with pytest.raises(ValueError, match=r"dout has shape \(2, 5, 8\), expected \(2, 5, 16\) like x"):
        backward(dout=x[..., :8])
    with pytest.raises(ValueError, match=r"mean has shape \(9,\), expected \(10,\)"):
        backward(mean=stats[:9])
    with pytest.raises(ValueError, match="rstd has dtype Half, expected contiguous float32"):
        backward(rstd=stats.half())
    with pytest.raises(ValueError, match=r"h has shape \(10, 16\), expected \(10, 32\)"):
        backward(h=h[:, :16])


def test_facts():
    assert C.cpu_capabilities()["fp32"] in ("avx512", "avx2", "baseline")
    assert C.cpu_capabilities()["bf16"] in ("brgemm", "avx512bf16", "fp32")
    assert C.build_info()["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_built_with_threads():
    assert C.build_info()["openmp"], "compile with -fopenmp: without it every op runs on one thread"
