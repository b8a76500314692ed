// Building blocks of the backward passes.
//
// A weight gradient is dW^T (E, O) = X^T (E, M) dY (M, O): X is transposed once, in chunks of rows, and each task takes
// 64 columns of dY over all M, so nothing is summed across threads. Sums over rows are kept for fixed groups of rows
// and added in order. So gradients do not depend on the number of threads.
#pragma once

#include "linear.h"

namespace fastvit::cpu {

constexpr int64_t MAX_ROW_CHUNK = 832;  // rows a weight-gradient GEMM call sums over; four images of 197 tokens fit
constexpr int64_t ROW_GROUP = 64;       // rows a partial sum covers

// As equal as multiples of 16 can be: a few rows left over would cost a pass over all sums.
inline int64_t row_chunks(int64_t rows) { return ceil_div(rows, MAX_ROW_CHUNK); }
inline int64_t row_chunk_size(int64_t rows) { return round_up(ceil_div(rows, row_chunks(rows)), LANES); }
inline Range row_chunk(int64_t rows, int64_t i) {
  const int64_t size = row_chunk_size(rows);
  return {std::min(rows, i * size), std::min(rows, (i + 1) * size)};
}

// (chunks, width, ld): the rows of a chunk side by side, zeros behind the last.
template <class T>
struct TransposedRows {
  at::Tensor storage;
  int64_t width, ld;
  const T* chunk(int64_t i) const { return storage.const_data_ptr<T>() + i * width * ld; }
};

// dst[e * ld + m] = src[m * width + e] for 16 rows m
void transpose_rows16(const float* src, int64_t width, void* dst, int64_t ld, at::ScalarType dtype);

// load(i, buffer) writes row i in float32 to `buffer`, and as many as `spare` values behind it.
template <class T, class Load>
TransposedRows<T> transpose_rows(int64_t rows, int64_t width, const Load& load, int64_t spare = 0) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t ld = row_chunk_size(rows);
  TransposedRows<T> out{at::empty({row_chunks(rows), width, ld}, dtype), width, ld};
  T* data = out.storage.template mutable_data_ptr<T>();
  parallel_tasks(ceil_div(rows, ROW_GROUP), [&](int64_t group) {
    Scratch scratch;
    float* sixteen = scratch.take<float>(LANES * width + spare);
    for (int64_t m0 = group * ROW_GROUP; m0 < std::min(rows, (group + 1) * ROW_GROUP); m0 += LANES) {
      for (int64_t i = 0; i < LANES; ++i) {
        if (m0 + i < rows) {
          load(m0 + i, sixteen + i * width);
        } else {
          std::fill_n(sixteen + i * width, width, 0.0f);
        }
      }
      transpose_rows16(sixteen, width, data + m0 / ld * width * ld + m0 % ld, ld, dtype);
    }
  });
  return out;
}

// A matrix that a GEMM in T can read: `ld` elements a row, zeros up to an even width.
template <class T>
struct GradRows {
  at::Tensor storage;  // (M, ld) or (M, width)
  const T* data;
  int64_t ld;
  Rows rows(int64_t width) const { return {storage.narrow(1, 0, width), storage.size(0), width}; }
};

// dout * row_scale in T; in place when nothing has to change.
template <class T>
GradRows<T> scaled_rows(const Rows& dout, const RowScale& row_scale) {
  if (!row_scale.values && dout.usable_as<T>()) {
    return {dout.tensor, static_cast<const T*>(dout.row(0)), dout.stride()};
  }
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t ld = operand_ld<T>(dout.width);
  GradRows<T> out{at::empty({dout.count, ld}, dtype), nullptr, ld};
  T* data = out.storage.template mutable_data_ptr<T>();
  out.data = data;
  parallel_tasks(ceil_div(dout.count, ROW_GROUP), [&](int64_t group) {
    for (int64_t i = group * ROW_GROUP; i < std::min(dout.count, (group + 1) * ROW_GROUP); ++i) {
      scale_row(dout.row(i), dout.dtype(), dout.width, row_scale(i), data + i * ld, dtype);
      for (int64_t k = dout.width; k < padded_k<T>(dout.width); ++k) data[i * ld + k] = 0.0f;
    }
  });
  return out;
}

// Sums of `groups` rows of partial sums, in order.
at::Tensor sum_partials(const at::Tensor& partials);

// (width, padded to panels) column sums of dout * row_scale.
at::Tensor column_sums(const Rows& dout, const RowScale& row_scale);

// rows e, columns n of a float32 accumulator (width, 64), written as out[n, e] * scale[n]
struct TransposedTile {
  const float* sums;
  int64_t width, columns;
  const float* scale;  // (64), null for none
  void* out;
  int64_t stride;
  at::ScalarType dtype;
};
void store_transposed(const TransposedTile& tile);

// sum over i of a[i] * b[i], a in any dtype
float dot_row(const void* a, at::ScalarType dtype, const float* b, int64_t n);

// The gradient of a linear's weight W (O, E) and what hangs on it, from dY = layer_scale * G, G = row_scale * dout.
struct LinearWeightGrad {
  Rows dweight;                                         // (O, E) = layer_scale * G^T X; no rows when not wanted
  const float* layer_scale;                             // (O, padded), null for none
  Rows weight = {};                                     // (O, E), for dlayer_scale
  const float *bias = nullptr, *column_sums = nullptr;  // (O, padded)
  float* dlayer_scale = nullptr;                        // (O) = <W, G^T X> + bias * column_sums; null when not wanted
};

// One zero bias a column of a panel.
alignas(CACHE_LINE) inline constexpr float ZEROS[PANEL] = {};

template <class T>
void linear_weight_grad(const TransposedRows<T>& x, const GradRows<T>& g, int64_t rows, int64_t features,
                        const LinearWeightGrad& out);

// dx and the norm's gradients from dY (rows, K) and the packed matrix of a linear that follows a LayerNorm.
struct NormInputGrad {
  Rows x;
  const float *norm_weight, *mean, *rstd;
  Rows residual_grad;  // no rows for none
  Rows dx;             // no rows when not wanted
  bool want_norm;
  at::Tensor dnorm_weight = {}, dnorm_bias = {};  // (E, padded) float32 results
};

template <class T>
void norm_input_grad(const GradRows<T>& dy, const PackedWeight& weight, NormInputGrad& args);

// The rows of x normalised again, transposed. norm_weight, norm_bias: padded vectors.
template <class T>
TransposedRows<T> transposed_norm(const Rows& x, const at::Tensor& mean, const at::Tensor& rstd,
                                  const at::Tensor& norm_weight, const at::Tensor& norm_bias) {
  const float *means = mean.const_data_ptr<float>(), *rstds = rstd.const_data_ptr<float>();
  const float *gamma = norm_weight.const_data_ptr<float>(), *beta = norm_bias.const_data_ptr<float>();
  return transpose_rows<T>(x.count, x.width, [&](int64_t i, float* buffer) {
    normalize_row(x.as_float(i, buffer), x.width, {means[i], rstds[i]}, gamma, beta, buffer, at::kFloat);
  });
}

// A padded float32 result in the shape and dtype of its parameter; empty when not wanted.
inline at::Tensor vector_grad(bool wanted, const at::Tensor& padded, const std::optional<at::Tensor>& parameter) {
  if (!wanted) return at::empty({0}, at::kFloat);
  return padded.narrow(0, 0, parameter->numel()).to(parameter->scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace fastvit::cpu
