// Argument rules that several ops share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

#include "../common.h"
#include "epilogue.h"
#include "fork.h"

namespace fastvit::cpu {

// At the start of every op. The ops compute; recording gradients is the caller's business.
struct NoAutograd {
  at::AutoDispatchBelowADInplaceOrView guard;
  NoAutograd() { survive_fork(); }
};

inline void check_input(const char* op, const char* name, const Tensor& x) {
  check_tensor(op, name, x);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, op, ": ", name, " has shape ", shape_text(x.sizes()),
                    ", expected (..., E) with E of at least 1");
}

// (any, columns)
inline void check_weight(const char* op, const char* name, const Tensor& weight, int64_t columns, const char* why) {
  check_tensor(op, name, weight);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == columns && weight.size(0) >= 1, op, ": ", name,
                    " has shape ", shape_text(weight.sizes()), ", expected (O, ", columns, ") ", why);
}

// (F, E) and (E, F) of one dtype
inline void check_mlp_weights(const char* op, const Tensor& x, const Tensor& fc1_weight, const Tensor& fc2_weight) {
  check_weight(op, "fc1_weight", fc1_weight, x.size(-1), "like x");
  check_shape(op, "fc2_weight", fc2_weight, {x.size(-1), fc1_weight.size(0)}, "like fc1_weight transposed");
  check_same_dtype(op, "fc2_weight", fc2_weight, "fc1_weight", fc1_weight);
}

inline void check_norm(const char* op, const Tensor& x, const OptionalTensor& norm_weight,
                       const OptionalTensor& norm_bias) {
  check_shape(op, "norm_weight", norm_weight, {x.size(-1)}, "like x");
  check_shape(op, "norm_bias", norm_bias, {x.size(-1)}, "like x");
}

inline void check_row_scale(const char* op, const Tensor& x, const OptionalTensor& row_scale) {
  if (!present(row_scale)) return;
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x has shape ", shape_text(x.sizes()), ", expected (B, ..., E) for row_scale");
  check_shape(op, "row_scale", row_scale, {x.size(0)}, "like the samples of x");
}

inline void check_statistics(const char* op, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  for (const auto& [name, values] : {std::pair{"mean", mean}, std::pair{"rstd", rstd}}) {
    check_shape(op, name, values, {flat_rows(x)}, "like the rows of x");
    TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.is_contiguous(), op, ": ", name, " has dtype ",
                      values.scalar_type(), ", expected contiguous float32");
  }
}

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

inline Tensor empty_if(bool wanted, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return wanted ? at::empty(sizes, options) : at::empty({0}, options);
}

// Gradients when there are no rows.
inline Tensor zeros_if(bool wanted, const OptionalTensor& like) {
  return wanted ? at::zeros_like(*like) : at::empty({0}, at::kFloat);
}

inline Activation parse_activation(const char* op, const std::string& act) {
  if (act == "gelu") return Activation::gelu;
  if (act == "gelu_tanh") return Activation::gelu_tanh;
  if (act == "quick_gelu") return Activation::quick_gelu;
  TORCH_CHECK_VALUE(false, op, ": act is '", act, "', expected one of 'gelu', 'gelu_tanh', 'quick_gelu'");
}

}  // namespace fastvit::cpu
