// Rows of activations: reading them as float32, LayerNorm forward and backward, writing them back.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "parallel.h"

namespace fastvit::cpu {

// A tensor (..., width) as `count` rows, in any float dtype and with any row stride.
struct Rows {
  at::Tensor tensor;
  int64_t count = 0, width = 0;

  at::ScalarType dtype() const { return tensor.scalar_type(); }
  int64_t stride() const { return tensor.stride(0); }
  const void* row(int64_t i) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + i * stride() * tensor.element_size();
  }
  void* mutable_row(int64_t i) const {
    return static_cast<char*>(tensor.mutable_data_ptr()) + i * stride() * tensor.element_size();
  }
  // Row i in float32: in place when it already is, else converted into `buffer` (width).
  const float* as_float(int64_t i, float* buffer) const;
  // Can a GEMM in T read the rows where they lie?
  template <class T>
  bool usable_as() const {
    return dtype() == c10::CppTypeToScalarType<T>::value && (sizeof(T) == 4 || width % 2 == 0);
  }
};

Rows rows_of(const at::Tensor& tensor);

// The same rows when `wanted`, else none.
inline Rows rows_if(bool wanted, const at::Tensor& tensor) { return wanted ? rows_of(tensor) : Rows{}; }

// The vector in float32, padded to whole panels; `missing` everywhere when there is none.
at::Tensor padded_vector(const std::optional<at::Tensor>& vector, int64_t size, float missing);

// One factor a row from one a sample: row i takes row_scale[i / rows_per_sample]; 1 where there is none.
struct RowScale {
  at::Tensor tensor;
  const float* values = nullptr;
  int64_t rows_per_sample = 1;

  RowScale(const std::optional<at::Tensor>& row_scale, int64_t rows);
  float operator()(int64_t row) const { return values ? values[row / rows_per_sample] : 1.0f; }
};

// dst[0, n) = scale * src[0, n), any pair of dtypes.
void scale_row(const void* src, at::ScalarType src_dtype, int64_t n, float scale, void* dst, at::ScalarType dst_dtype);

struct Statistics {
  float mean, rstd;
};

Statistics row_statistics(const float* x, int64_t n, float eps);

// out = (x - mean) * rstd * weight + bias
void normalize_row(const float* x, int64_t n, Statistics stats, const float* weight, const float* bias, void* out,
                   at::ScalarType out_dtype);

// One row of LayerNorm's backward. dy, the gradient of its output, is overwritten; adds to dweight, dbias if not null.
struct NormGradRow {
  const float* x;
  float* dy;
  const float *weight, *residual_grad;  // residual_grad may be null
  Statistics stats;
  int64_t n;
  float *dweight, *dbias;
  void* dx;  // may be null
  at::ScalarType dx_dtype;
};
void normalize_row_backward(const NormGradRow& row);

// total[i] += values[i]; in double, because sums over rows are long
void add_to(double* total, const float* values, int64_t n);

}  // namespace fastvit::cpu
