// Glue: torch.ops.fastvit_cuda.*, the kernels behind LayerNorm + MLP, through LibTorch's stable ABI.
// Every function checks, allocates and launches; fastvit/ops/_cuda.py composes them with cuBLAS products.
#include "layernorm_mlp.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/glue.h"

namespace fastvit {

namespace {

int64_t samples(const Checks& checks, const MaybeTensor& row_scale, int64_t rows) {
  if (!row_scale) return rows;
  const int64_t count = row_scale->dim() == 1 ? row_scale->size(0) : -1;
  checks.expect(count > 0 ? rows % count == 0 : count == 0 && rows == 0, [&] {
    return "row_scale has shape " + text(row_scale->sizes()) + ", expected one factor a sample of " +
           std::to_string(rows) + " rows";
  });
  return count;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layernorm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps,
                                                 ScalarType dtype) {
  const Checks checks("layernorm_fwd", "x", x);
  const Matrix x_rows = checks.matrix("x", x);
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType kind = checks.dtype("the result", dtype);
  checks.fits("x", x_rows.dtype, "the result", kind);
  const Vector w = checks.vector("weight", weight, cols, kind, "x");
  const Vector b = checks.vector("bias", bias, cols, kind, "x");
  if (weight && bias) checks.same_dtype("weight", w.dtype, "bias", b.dtype);
  const OnDevice device(x);
  Tensor y = empty(x, {rows, cols}, dtype);
  Tensor mean = empty(x, {rows}, ScalarType::Float), rstd = empty(x, {rows}, ScalarType::Float);
  LayerNormFwd p{};
  p.x = x_rows;
  p.weight = w;
  p.bias = b;
  p.y = matrix_of(checks, "y", y);
  p.mean = static_cast<float*>(mean.data_ptr());
  p.rstd = static_cast<float*>(rstd.data_ptr());
  p.rows = rows;
  p.cols = int(cols);
  p.eps = float(eps);
  check_launch("layernorm_fwd", launch_layernorm_fwd(p, device.stream()));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                         MaybeTensor weight, MaybeTensor bias, MaybeTensor dresidual,
                                                         bool want_params, bool want_y) {
  const Checks checks("layernorm_bwd", "dy", dy);
  LayerNormBwd p{};
  p.dy = checks.matrix("dy", dy);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  p.x = checks.matrix("x", x, rows, cols, "dy");
  checks.fits("x", p.x.dtype, "dy", p.dy.dtype);
  p.mean = checks.floats("mean", mean, rows, "the rows of dy");
  p.rstd = checks.floats("rstd", rstd, rows, "the rows of dy");
  p.weight = checks.vector("weight", weight, cols, p.dy.dtype, "dy");
  p.bias = checks.vector("bias", bias, cols, p.dy.dtype, "dy");
  if (weight && bias) checks.same_dtype("weight", p.weight.dtype, "bias", p.bias.dtype);
  p.dresidual = checks.matrix("dresidual", dresidual, rows, cols, "dy");
  if (dresidual) checks.same_dtype("dresidual", p.dresidual.dtype, "x", p.x.dtype);
  const OnDevice device(dy);
  Tensor dx = empty(x, {rows, cols}, x.scalar_type());
  Tensor y = want_y ? empty(dy, {rows, cols}, dy.scalar_type()) : nothing(dy);
  p.dx = matrix_of(checks, "dx", dx);
  if (want_y) p.y = matrix_of(checks, "y", y);
  p.rows = rows;
  p.cols = int(cols);
  p.groups = rows == 0 ? 0 : layernorm_bwd_groups(p);
  Tensor partials = want_params ? empty(dy, {p.groups, 2, cols}, ScalarType::Float) : nothing(dy);
  if (want_params) p.partials = static_cast<float*>(partials.data_ptr());
  check_launch("layernorm_bwd", launch_layernorm_bwd(p, device.stream()));
  if (!want_params) return {dx, nothing(dy), nothing(dy), y};
  const ScalarType dtype = weight ? weight->scalar_type() : bias ? bias->scalar_type() : ScalarType::Float;
  const DType kind = weight ? p.weight.dtype : bias ? p.bias.dtype : DType::kFloat32;
  Tensor dweight = empty(dy, {cols}, dtype), dbias = empty(dy, {cols}, dtype);
  SumPartials sum{};
  sum.partials = p.partials;
  sum.out[0] = {dweight.data_ptr(), kind};
  sum.out[1] = {dbias.data_ptr(), kind};
  sum.groups = p.groups;
  sum.vectors = 2;
  sum.cols = sum.stride = cols;
  check_launch("layernorm_bwd", launch_sum_partials(sum, device.stream()));
  return {dx, dweight, dbias, y};
}

std::tuple<Tensor, Tensor> scale(Tensor x, MaybeTensor row_scale, MaybeTensor column_scale, ScalarType dtype,
                                 std::optional<ScalarType> sums) {
  const Checks checks("scale", "x", x);
  Scale p{};
  p.x = checks.matrix("x", x);
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType kind = checks.dtype("the result", dtype);
  checks.fits("x", p.x.dtype, "the result", kind);
  p.samples = samples(checks, row_scale, rows);
  p.row_scale = checks.vector("row_scale", row_scale, p.samples, kind, "the result");
  p.column_scale = checks.vector("column_scale", column_scale, cols, kind, "the result");
  const DType sums_kind = sums ? checks.dtype("sums", *sums) : DType::kFloat32;
  const OnDevice device(x);
  Tensor y = empty(x, {rows, cols}, dtype);
  p.y = matrix_of(checks, "y", y);
  p.pass = {rows, cols, pass_groups(rows, cols), nullptr};
  Tensor partials = sums ? empty(x, {p.pass.groups, cols}, ScalarType::Float) : nothing(x);
  if (sums) p.pass.partials = static_cast<float*>(partials.data_ptr());
  check_launch("scale", launch_scale(p, device.stream()));
  return {y, sums ? finish_sums("scale", partials, p.pass, *sums, sums_kind, device) : nothing(x)};
}

Tensor column_sum(Tensor x, ScalarType dtype) {
  const Checks checks("column_sum", "x", x);
  Scale p{};
  p.x = checks.matrix("x", x);
  p.y.dtype = p.x.dtype;
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType kind = checks.dtype("the result", dtype);
  const OnDevice device(x);
  p.samples = rows;
  p.pass = {rows, cols, pass_groups(rows, cols), nullptr};
  Tensor partials = empty(x, {p.pass.groups, cols}, ScalarType::Float);
  p.pass.partials = static_cast<float*>(partials.data_ptr());
  check_launch("column_sum", launch_scale(p, device.stream()));
  return finish_sums("column_sum", partials, p.pass, dtype, kind, device);
}

namespace {

void act_fwd(Tensor h, Tensor a, std::string act) {
  const Checks checks("act_fwd", "h", h);
  ActFwd p{};
  p.h = checks.matrix("h", h);
  p.a = checks.matrix("a", a, h.size(0), h.size(1), "h");
  checks.same_dtype("a", p.a.dtype, "h", p.h.dtype);
  p.act = activation(checks, act);
  const OnDevice device(h);
  p.pass = {h.size(0), h.size(1), pass_groups(h.size(0), h.size(1)), nullptr};
  check_launch("act_fwd", launch_act_fwd(p, device.stream()));
}

Tensor act_bwd(Tensor da, Tensor h, MaybeTensor a, std::string act, std::optional<ScalarType> sums) {
  const Checks checks("act_bwd", "da", da);
  ActBwd p{};
  p.da = checks.matrix("da", da);
  const int64_t rows = da.size(0), cols = da.size(1);
  p.h = checks.matrix("h", h, rows, cols, "da");
  p.a = checks.matrix("a", a, rows, cols, "da");
  checks.same_dtype("h", p.h.dtype, "da", p.da.dtype);
  if (a) checks.same_dtype("a", p.a.dtype, "da", p.da.dtype);
  p.act = activation(checks, act);
  const DType kind = sums ? checks.dtype("sums", *sums) : DType::kFloat32;
  const OnDevice device(da);
  p.pass = {rows, cols, pass_groups(rows, cols), nullptr};
  Tensor partials = sums ? empty(da, {p.pass.groups, cols}, ScalarType::Float) : nothing(da);
  if (sums) p.pass.partials = static_cast<float*>(partials.data_ptr());
  check_launch("act_bwd", launch_act_bwd(p, device.stream()));
  return sums ? finish_sums("act_bwd", partials, p.pass, *sums, kind, device) : nothing(da);
}

Tensor scale_residual_fwd(Tensor branch, MaybeTensor residual, MaybeTensor layer_scale, MaybeTensor row_scale,
                          ScalarType dtype) {
  const Checks checks("scale_residual_fwd", "branch", branch);
  ScaleResidualFwd p{};
  p.branch = checks.matrix("branch", branch);
  const int64_t rows = branch.size(0), cols = branch.size(1);
  const DType kind = checks.dtype("the result", dtype);
  checks.fits("the result", kind, "branch", p.branch.dtype);
  p.residual = checks.matrix("residual", residual, rows, cols, "branch");
  if (residual) checks.same_dtype("residual", p.residual.dtype, "the result", kind);
  p.layer_scale = checks.vector("layer_scale", layer_scale, cols, p.branch.dtype, "branch");
  p.samples = samples(checks, row_scale, rows);
  p.row_scale = checks.vector("row_scale", row_scale, p.samples, p.branch.dtype, "branch");
  const OnDevice device(branch);
  Tensor out = empty(branch, {rows, cols}, dtype);
  p.out = matrix_of(checks, "out", out);
  p.pass = {rows, cols, pass_groups(rows, cols), nullptr};
  check_launch("scale_residual_fwd", launch_scale_residual_fwd(p, device.stream()));
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_scale_bwd(Tensor g, Tensor weight, MaybeTensor bias, MaybeTensor sums,
                                                   Tensor layer_scale) {
  const Checks checks("layer_scale_bwd", "g", g);
  LayerScaleBwd p{};
  p.g = checks.matrix("g", g);
  checks.same_dtype("g", p.g.dtype, "float32", DType::kFloat32);
  const int64_t rows = g.size(0), cols = g.size(1);
  p.weight = checks.matrix("weight", weight, rows, cols, "g");
  p.bias = checks.vector("bias", bias, rows, p.weight.dtype, "weight");
  p.sums = checks.floats("sums", sums, rows, "the rows of weight");
  p.layer_scale = checks.vector("layer_scale", layer_scale, rows, p.weight.dtype, "weight");
  const OnDevice device(g);
  Tensor dweight = empty(weight, {rows, cols}, weight.scalar_type());
  Tensor dbias = sums ? empty(weight, {rows}, weight.scalar_type()) : nothing(weight);
  Tensor dlayer_scale = empty(layer_scale, {rows}, layer_scale.scalar_type());
  p.dweight = matrix_of(checks, "dweight", dweight);
  if (sums) p.dbias = {dbias.data_ptr(), p.weight.dtype};
  p.dlayer_scale = {dlayer_scale.data_ptr(), p.layer_scale.dtype};
  p.rows = rows;
  p.cols = cols;
  check_launch("layer_scale_bwd", launch_layer_scale_bwd(p, device.stream()));
  return {dweight, dbias, dlayer_scale};
}

namespace {

std::string why_not_device(int64_t index) {
  const torch::stable::accelerator::DeviceGuard guard{int32_t(index)};
  const cudaError_t error = has_kernels();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY(fastvit_cuda, m) {
  m.def(
      "layernorm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layernorm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? dresidual,"
      " bool want_params, bool want_y) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("act_fwd(Tensor h, Tensor(a!) a, str act) -> ()");
  m.def("act_bwd(Tensor(a!) da, Tensor h, Tensor(b!)? a, str act, ScalarType? sums) -> Tensor");
  m.def(
      "scale_residual_fwd(Tensor branch, Tensor? residual, Tensor? layer_scale, Tensor? row_scale, ScalarType dtype)"
      " -> Tensor");
  m.def(
      "scale(Tensor x, Tensor? row_scale, Tensor? column_scale, ScalarType dtype, ScalarType? sums)"
      " -> (Tensor, Tensor)");
  m.def("column_sum(Tensor x, ScalarType dtype) -> Tensor");
  m.def(
      "layer_scale_bwd(Tensor g, Tensor weight, Tensor? bias, Tensor? sums, Tensor layer_scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("why_not_device(int index) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CompositeExplicitAutograd, m) {
  m.impl("why_not_device", TORCH_BOX(&fastvit::why_not_device));
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) {
  m.impl("layernorm_fwd", TORCH_BOX(&fastvit::layernorm_fwd));
  m.impl("layernorm_bwd", TORCH_BOX(&fastvit::layernorm_bwd));
  m.impl("act_fwd", TORCH_BOX(&fastvit::act_fwd));
  m.impl("act_bwd", TORCH_BOX(&fastvit::act_bwd));
  m.impl("scale_residual_fwd", TORCH_BOX(&fastvit::scale_residual_fwd));
  m.impl("scale", TORCH_BOX(&fastvit::scale));
  m.impl("column_sum", TORCH_BOX(&fastvit::column_sum));
  m.impl("layer_scale_bwd", TORCH_BOX(&fastvit::layer_scale_bwd));
}
