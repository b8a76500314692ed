// Normalised and rotated heads; see ../heads.h.
#pragma once

#include "attention.h"
#include "rows.h"

namespace fastvit::cpu::FASTVIT_ISA {

constexpr int64_t COMMON_DIM = 64;  // of a head: its code has no loop over columns
alignas(CACHE_LINE) constexpr float PAIR_SIGNS[LANES] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};

// The two values of every pair exchanged.
FASTVIT_INLINE f32x16 swapped(f32x16 value) {
  FASTVIT_EACH_PART value.part[i] = exchanged<1>(value.part[i]);
  return value;
}

// Sines and cosines of row i; null where it is not rotated.
FASTVIT_INLINE const float* angles_of(const HeadRowsIn& in, int64_t i) {
  return in.angles && i >= in.unrotated ? in.angles + (i - in.unrotated) * in.angles_stride : nullptr;
}

// Rows of a head are far apart, where no processor fetches ahead by itself.
template <class S>
FASTVIT_INLINE void fetch_row_after(const HeadRowsIn& in, int64_t i) {
  constexpr int64_t AHEAD = 12;
  if (i + AHEAD >= in.count) return;
  const char* row = reinterpret_cast<const char*>(static_cast<const S*>(in.rows) + (i + AHEAD) * in.stride);
  for (int64_t byte = 0; byte < in.dim * static_cast<int64_t>(sizeof(S)); byte += CACHE_LINE) {
    __builtin_prefetch(row + byte, 0, 3);
  }
}

FASTVIT_INLINE Statistics head_statistics(const float* x, int64_t dim, HeadNorm norm, float eps) {
  f32x16 sums{}, squares{};
  if (norm == HeadNorm::layer) {
    for (int64_t c = 0; c < dim; c += LANES) sums += load_part(x + c, dim - c);
  }
  const float mean = sum_lanes(sums) / dim;
  for (int64_t c = 0; c < dim; c += LANES) {
    const f32x16 centred = first_lanes(load_part(x + c, dim - c) - mean, dim - c, 0.0f);
    squares += centred * centred;
  }
  return {mean, 1.0f / __builtin_sqrtf(sum_lanes(squares) / dim + eps)};
}

template <class D>
FASTVIT_INLINE void rotate_row(const float* x, const float* angles, int64_t dim, bool half, D* out) {
  const float *sin = angles, *cos = angles + dim;
  if (half) {
    const int64_t h = dim / 2;
    for (int64_t c = 0; c < h; c += LANES) {
      const f32x16 a = load_part(x + c, h - c), b = load_part(x + h + c, h - c);
      store_part(out + c, a * load_part(cos + c, h - c) - b * load_part(sin + c, h - c), h - c);
      store_part(out + h + c, b * load_part(cos + h + c, h - c) + a * load_part(sin + h + c, h - c), h - c);
    }
    return;
  }
  const f32x16 signs = load16(PAIR_SIGNS);
  for (int64_t c = 0; c < dim; c += LANES) {
    const f32x16 value = load_part(x + c, dim - c);
    const f32x16 turned = swapped(value) * signs;
    store_part(out + c, value * load_part(cos + c, dim - c) + turned * load_part(sin + c, dim - c), dim - c);
  }
}

// The gradient of a row before its rotation, in place.
FASTVIT_INLINE void rotate_back(float* grad, const float* angles, int64_t dim, bool half) {
  const float *sin = angles, *cos = angles + dim;
  if (half) {
    const int64_t h = dim / 2;
    for (int64_t c = 0; c < h; c += LANES) {
      const f32x16 a = load_part(grad + c, h - c), b = load_part(grad + h + c, h - c);
      store_part(grad + c, a * load_part(cos + c, h - c) + b * load_part(sin + h + c, h - c), h - c);
      store_part(grad + h + c, b * load_part(cos + h + c, h - c) - a * load_part(sin + c, h - c), h - c);
    }
    return;
  }
  const f32x16 signs = load16(PAIR_SIGNS);
  for (int64_t c = 0; c < dim; c += LANES) {
    const f32x16 value = load_part(grad + c, dim - c);
    const f32x16 turned = swapped(value * load_part(sin + c, dim - c)) * signs;
    store_part(grad + c, value * load_part(cos + c, dim - c) - turned, dim - c);
  }
}

// A row in float32 between its steps: in registers where the head dim is DIM, not 0 for any.
template <int64_t DIM>
struct RowBuffer {
  alignas(CACHE_LINE) float values[DIM];
  FASTVIT_INLINE RowBuffer(const HeadRowsIn&, int) {}
};
template <>
struct RowBuffer<0> {
  float* values;
  FASTVIT_INLINE RowBuffer(const HeadRowsIn& in, int which) : values(in.buffer + which * round_up(in.dim, PANEL)) {}
};

template <int64_t DIM, class D, class S>
FASTVIT_INLINE void prepare_rows(const HeadRowsIn& in, void* out, int64_t ld) {
  const int64_t dim = DIM ? DIM : in.dim;
  for (int64_t i = 0; i < in.count; ++i) {
    RowBuffer<DIM> x(in, 0);
    D* target = static_cast<D*>(out) + i * ld;
    fetch_row_after<S>(in, i);
    scale_row_to<float>(static_cast<const S*>(in.rows) + i * in.stride, dim, 1.0f, x.values);
    if (in.norm != HeadNorm::none) {
      const Statistics stats = head_statistics(x.values, dim, in.norm, in.eps);
      normalize_row_to<float>(x.values, dim, stats, in.weight, in.bias, x.values);
    }
    if (const float* angles = angles_of(in, i)) {
      rotate_row(x.values, angles, dim, in.half, target);
    } else {
      scale_row_to<D>(x.values, dim, 1.0f, target);
    }
  }
}

template <class D, class S>
FASTVIT_INLINE void prepare_heads_to(const HeadRowsIn& in, void* out, int64_t ld) {
  in.dim == COMMON_DIM ? prepare_rows<COMMON_DIM, D, S>(in, out, ld) : prepare_rows<0, D, S>(in, out, ld);
}

template <class S>
FASTVIT_INLINE void prepare_heads_from(const HeadRowsIn& in, void* out, int64_t ld, at::ScalarType dtype) {
  if (dtype == at::kBFloat16) {
    prepare_heads_to<c10::BFloat16, S>(in, out, ld);
  } else {
    prepare_heads_to<float, S>(in, out, ld);
  }
}

void prepare_heads(const HeadRowsIn& in, void* out, int64_t ld, at::ScalarType dtype) {
  FASTVIT_BY_DTYPE(in.dtype, prepare_heads_from, in, out, ld, dtype);
}

template <int64_t DIM, class S>
FASTVIT_INLINE void prepare_rows_backward(const HeadRowsIn& in, const HeadGradRows& grads) {
  const int64_t dim = DIM ? DIM : in.dim;
  for (int64_t i = 0; i < in.count; ++i) {
    RowBuffer<DIM> grad(in, 0), x(in, 1);
    S* out = static_cast<S*>(grads.out) + i * grads.stride;
    if (in.norm != HeadNorm::none) fetch_row_after<S>(in, i);
    scale_row_to<float>(grads.grads + i * grads.ld, dim, 1.0f, grad.values);
    if (const float* angles = angles_of(in, i)) rotate_back(grad.values, angles, dim, in.half);
    if (in.norm == HeadNorm::none) {
      scale_row_to<S>(grad.values, dim, 1.0f, out);
      continue;
    }
    scale_row_to<float>(static_cast<const S*>(in.rows) + i * in.stride, dim, 1.0f, x.values);
    const Statistics stats = head_statistics(x.values, dim, in.norm, in.eps);
    const NormGradRow row{x.values, grad.values,   in.weight,   nullptr, stats,
                          dim,      grads.dweight, grads.dbias, out,     c10::CppTypeToScalarType<S>::value};
    normalize_row_gradient(row, in.norm == HeadNorm::layer);
  }
}

template <class S>
FASTVIT_INLINE void prepare_heads_backward_as(const HeadRowsIn& in, const HeadGradRows& grads) {
  in.dim == COMMON_DIM ? prepare_rows_backward<COMMON_DIM, S>(in, grads) : prepare_rows_backward<0, S>(in, grads);
}

void prepare_heads_backward(const HeadRowsIn& in, const HeadGradRows& grads) {
  FASTVIT_BY_DTYPE(in.dtype, prepare_heads_backward_as, in, grads);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
