#include "rows.h"

#include <algorithm>

#include "gemm.h"

namespace fastvit::cpu {

Rows rows_of(const at::Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  at::Tensor rows = tensor.reshape({-1, width});
  if (rows.stride(1) != 1 && width > 1) rows = rows.contiguous();
  return {rows, rows.size(0), width};
}

const float* Rows::as_float(int64_t i, float* buffer) const {
  if (dtype() == at::kFloat) return static_cast<const float*>(row(i));
  scale_row(row(i), dtype(), width, 1.0f, buffer, at::kFloat);
  return buffer;
}

at::Tensor padded_vector(const std::optional<at::Tensor>& vector, int64_t size, float missing) {
  const bool given = vector.has_value() && vector->defined();
  const int64_t padded_size = round_up(size, PANEL);
  if (given && vector->scalar_type() == at::kFloat && size == padded_size && vector->is_contiguous()) return *vector;
  at::Tensor padded = at::empty({padded_size}, at::kFloat);
  float* values = padded.mutable_data_ptr<float>();
  if (!given) {
    std::fill_n(values, padded_size, missing);
    return padded;
  }
  const bool known = vector->scalar_type() == at::kBFloat16 || vector->scalar_type() == at::kHalf;
  const at::Tensor source = (known ? *vector : vector->to(at::kFloat)).contiguous();
  scale_row(source.const_data_ptr(), source.scalar_type(), size, 1.0f, values, at::kFloat);
  std::fill_n(values + size, padded_size - size, 0.0f);
  return padded;
}

RowScale::RowScale(const std::optional<at::Tensor>& row_scale, int64_t rows) {
  if (!row_scale.has_value() || !row_scale->defined() || rows == 0) return;
  tensor = row_scale->to(at::kFloat).contiguous();
  values = tensor.const_data_ptr<float>();
  rows_per_sample = rows / tensor.numel();
}

}  // namespace fastvit::cpu
