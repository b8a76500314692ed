// What the ops' glue shares: fresh tensors, the activation's name, the second stage of column sums.
#pragma once

#include <algorithm>
#include <tuple>

#include "cuda/checks.h"

namespace fastvit {

// Contiguous. Not torch::stable::new_empty, which looks its op up by name at each call.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[4], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = stride, stride *= std::max<int64_t>(sizes.begin()[i], 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, number, device_type,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor nothing(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

inline Matrix matrix_of(const Checks& checks, const char* name, const Tensor& t) { return checks.matrix(name, t); }

inline Activation activation(const Checks& checks, const std::string& act) {
  if (act == "gelu") return Activation::kGelu;
  if (act == "gelu_tanh") return Activation::kGeluTanh;
  if (act != "quick_gelu") checks.fail("act is '" + act + "', expected 'gelu', 'gelu_tanh' or 'quick_gelu'");
  return Activation::kQuickGelu;
}

// The second stage of a pass that summed its columns; partial sums lie `stride` apart where that is not their number.
inline Tensor finish_sums(const char* op, const Tensor& partials, const Pass& pass, ScalarType dtype, DType kind,
                          const OnDevice& device, int64_t stride = 0) {
  Tensor sums = empty(partials, {pass.cols}, dtype);
  SumPartials p{};
  p.partials = pass.partials;
  p.out[0] = {sums.data_ptr(), kind};
  p.groups = pass.groups;
  p.vectors = 1;
  p.cols = pass.cols;
  p.stride = stride != 0 ? stride : pass.cols;
  check_launch(op, launch_sum_partials(p, device.stream()));
  return sums;
}

// Ops of layernorm_mlp.cpp that others are made of. (y, mean, rstd), y in dtype
std::tuple<Tensor, Tensor, Tensor> layernorm_fwd(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps,
                                                 ScalarType dtype);
// (dx + dresidual, dweight, dbias, y once more)
std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd,
                                                         MaybeTensor weight, MaybeTensor bias, MaybeTensor dresidual,
                                                         bool want_params, bool want_y);
// (x * row_scale * column_scale in dtype, its column sums)
std::tuple<Tensor, Tensor> scale(Tensor x, MaybeTensor row_scale, MaybeTensor column_scale, ScalarType dtype,
                                 std::optional<ScalarType> sums);
Tensor column_sum(Tensor x, ScalarType dtype);
// Gradients of weight, bias and layer_scale from g = dbranch^T inputs and the column sums of dbranch
std::tuple<Tensor, Tensor, Tensor> layer_scale_bwd(Tensor g, Tensor weight, MaybeTensor bias, MaybeTensor sums,
                                                   Tensor layer_scale);

}  // namespace fastvit
