// Argument checks shared by the ops: every message names the op, the tensor, the rule and what came.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>

namespace fastvit {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool present(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline void check_tensor(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), op, ": ", name, " is missing");
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), op, ": ", name, " is on ", tensor.device(), ", expected the CPU");
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op, ": ", name, " has dtype ",
                    dtype, ", expected float32, bfloat16 or float16");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected,
                        const char* why) {
  check_tensor(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " has shape ", shape_text(tensor.sizes()),
                    ", expected ", shape_text(expected), " ", why);
}

inline void check_shape(const char* op, const char* name, const OptionalTensor& tensor, at::IntArrayRef expected,
                        const char* why) {
  if (present(tensor)) check_shape(op, name, *tensor, expected, why);
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const char* like_name,
                             const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " has dtype ", tensor.scalar_type(),
                    ", expected ", like.scalar_type(), " like ", like_name);
}

// (M, width) rows of a tensor whose leading dimensions are flattened; width is the size of the last one.
inline int64_t flat_rows(const Tensor& tensor) {
  return c10::multiply_integers(tensor.sizes().begin(), tensor.sizes().end() - 1);
}

}  // namespace fastvit
