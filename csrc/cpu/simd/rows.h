// Rows of activations: converted, normalised, and the backward of that.
#pragma once

#include "vector.h"

namespace fastvit::cpu::FASTVIT_ISA {

template <class D, class S>
FASTVIT_INLINE void scale_row_to(const S* src, int64_t n, float scale, void* dst) {
  for (int64_t i = 0; i < n; i += LANES) {
    store_part(static_cast<D*>(dst) + i, load_part(src + i, n - i) * scale, n - i);
  }
}

template <class S>
FASTVIT_INLINE void scale_row_from(const void* src, int64_t n, float scale, void* dst, at::ScalarType dst_dtype) {
  FASTVIT_BY_DTYPE(dst_dtype, scale_row_to, static_cast<const S*>(src), n, scale, dst);
}

template <class D>
FASTVIT_INLINE void normalize_row_to(const float* x, int64_t n, Statistics stats, const float* weight,
                                     const float* bias, void* out) {
  for (int64_t i = 0; i < n; i += LANES) {
    const f32x16 xhat = (load_part(x + i, n - i) - stats.mean) * stats.rstd;
    store_part(static_cast<D*>(out) + i, xhat * load16(weight + i) + load16(bias + i), n - i);
  }
}

template <class D>
FASTVIT_INLINE void norm_grad_dx(const NormGradRow& row, float mean_g, float mean_gx) {
  for (int64_t i = 0; i < row.n; i += LANES) {
    const int64_t left = row.n - i;
    const f32x16 xhat = (load_part(row.x + i, left) - row.stats.mean) * row.stats.rstd;
    f32x16 dx = (load_part(row.dy + i, left) - mean_g - xhat * mean_gx) * row.stats.rstd;
    if (row.residual_grad) dx += load_part(row.residual_grad + i, left);
    store_part(static_cast<D*>(row.dx) + i, dx, left);
  }
}

void scale_row(const void* src, at::ScalarType src_dtype, int64_t n, float scale, void* dst, at::ScalarType dst_dtype) {
  FASTVIT_BY_DTYPE(src_dtype, scale_row_from, src, n, scale, dst, dst_dtype);
}

Statistics row_statistics(const float* x, int64_t n, float eps) {
  // Four sums at a time: one alone would wait for the latency of each addition.
  constexpr int64_t STEP = 4 * LANES;
  f32x16 sums[4] = {};
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    for (int v = 0; v < 4; ++v) sums[v] += load16(x + i + v * LANES);
  }
  for (; i < n; i += LANES) sums[0] += load_part(x + i, n - i);
  const float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / n;
  f32x16 squares[4] = {};
  for (i = 0; i + STEP <= n; i += STEP) {
    for (int v = 0; v < 4; ++v) {
      const f32x16 centred = load16(x + i + v * LANES) - mean;
      squares[v] += centred * centred;
    }
  }
  for (; i + LANES <= n; i += LANES) {
    const f32x16 centred = load16(x + i) - mean;
    squares[0] += centred * centred;
  }
  float variance = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / __builtin_sqrtf(variance / n + eps)};
}

void normalize_row(const float* x, int64_t n, Statistics stats, const float* weight, const float* bias, void* out,
                   at::ScalarType out_dtype) {
  FASTVIT_BY_DTYPE(out_dtype, normalize_row_to, x, n, stats, weight, bias, out);
}

// With g = dy * weight and xhat the normalised row: dx = rstd (g - mean(g) - xhat mean(g xhat)); without mean(g) when
// the rows were not centred.
FASTVIT_INLINE void normalize_row_gradient(const NormGradRow& row, bool centred) {
  f32x16 sum_g{}, sum_gx{};
  for (int64_t i = 0; i < row.n; i += LANES) {
    const int64_t left = row.n - i;
    const f32x16 dy = load_part(row.dy + i, left), g = dy * load16(row.weight + i);
    const f32x16 xhat = (load_part(row.x + i, left) - row.stats.mean) * row.stats.rstd;
    sum_g += g;
    sum_gx += g * xhat;
    if (row.dweight) store16(row.dweight + i, load16(row.dweight + i) + dy * xhat);
    if (row.dbias) store16(row.dbias + i, load16(row.dbias + i) + dy);
    store_part(row.dy + i, g, left);
  }
  if (!row.dx) return;
  const float mean_g = centred ? sum_lanes(sum_g) / row.n : 0.0f, mean_gx = sum_lanes(sum_gx) / row.n;
  FASTVIT_BY_DTYPE(row.dx_dtype, norm_grad_dx, row, mean_g, mean_gx);
}

void normalize_row_backward(const NormGradRow& row) { normalize_row_gradient(row, true); }

void add_to(double* total, const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += values[i];
}

}  // namespace fastvit::cpu::FASTVIT_ISA
