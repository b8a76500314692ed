"""What the passes of csrc/cuda mean, in plain PyTorch: ``torch.ops.fastvit_cuda``'s names, arguments and results.

16-bit tensors are computed in float32, as in the kernels; float64 stays float64.
"""

import torch


def wide(*tensors):
    """float32 for 16-bit tensors, as the kernels compute; float64 stays."""
    out = [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return out if len(out) > 1 else out[0]


def gate(h, act):
    """h -> (gate, gate') where act(h) = h * gate(h), as in activation.cu."""
    if act == "gelu":
        return 0.5 + 0.5 * torch.erf(h * 0.5**0.5), torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5
    if act == "quick_gelu":
        z, dz = 1.702 * h, torch.full_like(h, 1.702)
    else:
        scale = 2 * (2 / torch.pi) ** 0.5
        z, dz = scale * h * (1 + 0.044715 * h * h), scale * (1 + 3 * 0.044715 * h * h)
    s = torch.sigmoid(z)
    return s, s * (1 - s) * dz


def layernorm_fwd(x, weight, bias, eps, dtype):
    xf = wide(x)
    mean = xf.mean(1)
    rstd = torch.rsqrt((xf - mean[:, None]).square().mean(1) + eps)
    y = (xf - mean[:, None]) * rstd[:, None]
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(dtype), mean, rstd


def linear_act(x, weight, bias, act, save, tile):
    h = wide(x) @ wide(weight).t()
    h = h if bias is None else h + bias
    y = h if act == "none" else h * gate(h, act)[0]
    return y.to(x.dtype), h.to(x.dtype) if save else x.new_empty(0)


def linear_residual(x, weight, bias, residual, layer_scale, row_scale, tile):
    branch = wide(x) @ wide(weight).t()
    branch = branch if bias is None else branch + bias
    branch = branch if layer_scale is None else branch * layer_scale
    return (residual + (branch if row_scale is None else branch * row_scale[:, None])).to(residual.dtype)


def linear_act_grad(dy, weight, h, act, want_a, sums, tile="large"):
    value, slope = gate(wide(h), act)
    dh = (wide(dy) @ wide(weight)) * (value + wide(h) * slope)
    a = (wide(h) * value).to(h.dtype) if want_a else h.new_empty(0)
    return dh.to(h.dtype), a, h.new_empty(0) if sums is None else dh.sum(0).to(sums)


def layernorm_linear_act(x, norm_weight, norm_bias, weight, bias, eps, act, save, tile):
    y, mean, rstd = layernorm_fwd(x, norm_weight, norm_bias, eps, weight.dtype)
    return *linear_act(y, weight, bias, act, save, tile), mean, rstd


def layernorm_mlp_residual(x, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, eps, act, save, tile1, tile2):
    a, h, mean, rstd = layernorm_linear_act(x, nw, nb, w1, b1, eps, act, save, tile1)
    return linear_residual(a, w2, b2, x, layer_scale, row_scale, tile2), h, mean, rstd


def layernorm_bwd(dy, x, mean, rstd, weight, bias, dresidual, want_params, want_y):
    dyf, xf = wide(dy, x)
    xhat = (xf - mean[:, None]) * rstd[:, None]
    g = dyf if weight is None else dyf * weight
    dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    dx = dx if dresidual is None else dx + dresidual
    params = weight if weight is not None else bias if bias is not None else mean
    empty = x.new_empty(0)
    dweight = (dyf * xhat).sum(0).to(params.dtype) if want_params else empty
    dbias = dyf.sum(0).to(params.dtype) if want_params else empty
    y = xhat if weight is None else xhat * weight
    return dx.to(x.dtype), dweight, dbias, (y if bias is None else y + bias).to(dy.dtype) if want_y else empty


def act_fwd(h, a, act):
    a.copy_(wide(h) * gate(wide(h), act)[0])


def act_bwd(da, h, a, act, sums):
    hf = wide(h)
    value, slope = gate(hf, act)
    dh = wide(da) * (value + hf * slope)
    if a is not None:
        a.copy_(hf * value)
    da.copy_(dh)
    return h.new_empty(0) if sums is None else dh.sum(0).to(sums)


def expand_rows(row_scale, rows):
    return wide(row_scale).repeat_interleave(rows // max(row_scale.shape[0], 1))[:, None]


def scale_residual_fwd(branch, residual, layer_scale, row_scale, dtype):
    out = wide(branch)
    out = out if layer_scale is None else out * wide(layer_scale)
    out = out if row_scale is None else out * expand_rows(row_scale, branch.shape[0])
    return (out if residual is None else out + residual).to(dtype)


def scale(x, row_scale, column_scale, dtype, sums):
    y = wide(x)
    y = y if row_scale is None else y * expand_rows(row_scale, x.shape[0])
    total = x.new_empty(0) if sums is None else y.sum(0).to(sums)
    return (y if column_scale is None else y * wide(column_scale)).to(dtype), total


def column_sum(x, dtype):
    return wide(x).sum(0).to(dtype)


def layer_scale_bwd(g, weight, bias, sums, layer_scale):
    scale_f = wide(layer_scale)
    dlayer_scale = (g * wide(weight)).sum(1)
    if bias is not None and sums is not None:
        dlayer_scale = dlayer_scale + wide(bias) * sums
    dbias = weight.new_empty(0) if sums is None else (sums * scale_f).to(weight.dtype)
    return (g * scale_f[:, None]).to(weight.dtype), dbias, dlayer_scale.to(layer_scale.dtype)


PASSES = (
    layernorm_fwd,
    layernorm_bwd,
    act_fwd,
    act_bwd,
    scale_residual_fwd,
    scale,
    column_sum,
    layer_scale_bwd,
)
PRODUCTS = (linear_act, linear_residual, linear_act_grad)
JOINED = (layernorm_linear_act, layernorm_mlp_residual)
