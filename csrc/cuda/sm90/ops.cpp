// Glue: the products of sm90/*.cu as torch.ops.fastvit_cuda.linear_*, beside the passes of layernorm_mlp.cpp.
// fastvit/ops/_sm90.py calls them for what they take; what they are given beyond that is an error here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/sm90/products.h"

namespace fastvit::sm90 {

std::tuple<Tensor, Tensor, Tensor> linear_act_grad(Tensor dy, Tensor weight, Tensor h, std::string act, bool want_a,
                                                   std::optional<ScalarType> sums, std::string tile) {
  const Checks checks("linear_act_grad", "dy", dy);
  LinearActGrad p{};
  p.dy = checks.matrix("dy", dy);
  p.rows = dy.size(0), p.depth = dy.size(1), p.cols = weight.dim() == 2 ? weight.size(1) : 0;
  p.dy = tma(checks, "dy", p.dy, p.depth, p.dy.dtype);
  p.weight = tma(checks, "weight", checks.matrix("weight", weight, p.depth, p.cols, "dy"), p.cols, p.dy.dtype);
  p.h = tma(checks, "h", checks.matrix("h", h, p.rows, p.cols, "dy and weight"), p.cols, p.dy.dtype);
  p.act = activation(checks, act);
  p.tile = tile_of(checks, tile);
  const DType kind = sums ? checks.dtype("sums", *sums) : DType::kFloat32;
  const OnDevice device(dy);
  p.device = dy.get_device_index();
  Tensor dh = empty(dy, {p.rows, p.cols}, dy.scalar_type());
  Tensor a = want_a ? empty(dy, {p.rows, p.cols}, dy.scalar_type()) : nothing(dy);
  p.dh = checks.matrix("dh", dh);
  if (want_a) p.a = checks.matrix("a", a);
  const TileSize size = kLinearActGradTiles[int(p.tile)];
  const int64_t tile_rows = size.rows, tile_cols = size.cols;
  const Pass pass{p.rows, p.cols, int((p.rows + tile_rows - 1) / tile_rows), nullptr};
  const int64_t stride = (p.cols + tile_cols - 1) / tile_cols * tile_cols;
  Tensor partials = sums ? empty(dy, {pass.groups, stride}, ScalarType::Float) : nothing(dy);
  if (sums) p.partials = static_cast<float*>(partials.data_ptr());
  if (p.rows > 0 && p.cols > 0) run("linear_act_grad", p, device.stream());
  if (!sums) return {dh, a, nothing(dy)};
  Pass summed = pass;
  summed.partials = p.partials;
  return {dh, a, finish_sums("linear_act_grad", partials, summed, *sums, kind, device, stride)};
}

namespace {

std::tuple<Tensor, Tensor> linear_act(Tensor x, Tensor weight, MaybeTensor bias, std::string act, bool save,
                                      std::string tile) {
  const Checks checks("linear_act", "x", x);
  LinearAct p{};
  p.x = checks.matrix("x", x);
  p.rows = x.size(0), p.depth = x.size(1), p.cols = weight.dim() == 2 ? weight.size(0) : 0;
  p.x = tma(checks, "x", p.x, p.depth, p.x.dtype);
  p.weight = tma(checks, "weight", checks.matrix("weight", weight, p.cols, p.depth, "x"), p.depth, p.x.dtype);
  p.bias = checks.vector("bias", bias, p.cols, p.x.dtype, "weight");
  p.act = act == "none" ? Activation::kNone : activation(checks, act);
  p.tile = tile_of(checks, tile);
  const OnDevice device(x);
  p.device = x.get_device_index();
  Tensor y = empty(x, {p.rows, p.cols}, x.scalar_type());
  Tensor h = save ? empty(x, {p.rows, p.cols}, x.scalar_type()) : nothing(x);
  p.y = tma(checks, "y", checks.matrix("y", y), p.cols);
  if (save) p.h = checks.matrix("h", h);
  if (p.rows == 0 || p.cols == 0) return {y, h};
  run("linear_act", p, device.stream());
  return {y, h};
}

Tensor linear_residual(Tensor x, Tensor weight, MaybeTensor bias, Tensor residual, MaybeTensor layer_scale,
                       MaybeTensor row_scale, std::string tile) {
  const Checks checks("linear_residual", "x", x);
  LinearResidual p{};
  p.x = checks.matrix("x", x);
  p.rows = x.size(0), p.depth = x.size(1), p.cols = weight.dim() == 2 ? weight.size(0) : 0;
  p.x = tma(checks, "x", p.x, p.depth, p.x.dtype);
  p.weight = tma(checks, "weight", checks.matrix("weight", weight, p.cols, p.depth, "x"), p.depth, p.x.dtype);
  p.residual = checks.matrix("residual", residual, p.rows, p.cols, "x and weight");
  checks.fits("residual", p.residual.dtype, "x", p.x.dtype);
  p.residual = tma(checks, "residual", p.residual, p.cols);
  p.bias = checks.vector("bias", bias, p.cols, p.x.dtype, "weight");
  p.layer_scale = checks.vector("layer_scale", layer_scale, p.cols, p.x.dtype, "weight");
  p.row_scale = checks.floats("row_scale", row_scale, p.rows, "the rows of x");
  p.tile = tile_of(checks, tile);
  const OnDevice device(x);
  p.device = x.get_device_index();
  Tensor y = empty(x, {p.rows, p.cols}, residual.scalar_type());
  p.y = checks.matrix("y", y);
  if (p.rows == 0 || p.cols == 0) return y;
  run("linear_residual", p, device.stream());
  return y;
}

// Several of the above in one call: with a small batch the host's way to an op takes longer than its kernel runs.
// (act(h), h, mean, rstd) with h = linear(layer_norm(x)).
std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_linear_act(Tensor x, MaybeTensor norm_weight,
                                                                MaybeTensor norm_bias, Tensor weight, MaybeTensor bias,
                                                                double eps, std::string act, bool save,
                                                                std::string tile) {
  const auto [y, mean, rstd] = layernorm_fwd(x, norm_weight, norm_bias, eps, weight.scalar_type());
  const auto [a, h] = linear_act(y, weight, bias, act, save, tile);
  return {a, h, mean, rstd};
}

// (x + row_scale * layer_scale * linear(act(h)), h, mean, rstd).
std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_mlp_residual(
    Tensor x, MaybeTensor norm_weight, MaybeTensor norm_bias, Tensor fc1_weight, MaybeTensor fc1_bias,
    Tensor fc2_weight, MaybeTensor fc2_bias, MaybeTensor layer_scale, MaybeTensor row_scale, double eps,
    std::string act, bool save, std::string fc1_tile, std::string fc2_tile) {
  const auto [a, h, mean, rstd] =
      layernorm_linear_act(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, act, save, fc1_tile);
  return {linear_residual(a, fc2_weight, fc2_bias, x, layer_scale, row_scale, fc2_tile), h, mean, rstd};
}

}  // namespace
}  // namespace fastvit::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(fastvit_cuda, m) {
  m.def("linear_act(Tensor x, Tensor weight, Tensor? bias, str act, bool save, str tile) -> (Tensor, Tensor)");
  m.def(
      "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, Tensor? row_scale,"
      " str tile) -> Tensor");
  m.def(
      "linear_act_grad(Tensor dy, Tensor weight, Tensor h, str act, bool want_a, ScalarType? sums, str tile)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "layernorm_linear_act(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps,"
      " str act, bool save, str tile) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layernorm_mlp_residual(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias,"
      " Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? row_scale, float eps, str act, bool save,"
      " str fc1_tile, str fc2_tile) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) {
  m.impl("linear_act", TORCH_BOX(&fastvit::sm90::linear_act));
  m.impl("linear_residual", TORCH_BOX(&fastvit::sm90::linear_residual));
  m.impl("linear_act_grad", TORCH_BOX(&fastvit::sm90::linear_act_grad));
  m.impl("layernorm_linear_act", TORCH_BOX(&fastvit::sm90::layernorm_linear_act));
  m.impl("layernorm_mlp_residual", TORCH_BOX(&fastvit::sm90::layernorm_mlp_residual));
}
