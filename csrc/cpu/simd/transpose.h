// Moving matrices: panels for the GEMM, transposed rows, and dot products of rows.
#pragma once

#include "gemm.h"

namespace fastvit::cpu::FASTVIT_ISA {

// dst (units, 64) = src (n, row_bytes) transposed in units of four bytes: a float, or a pair of bfloat16. What is
// missing of the last unit of a row, and missing columns, become zero. The sixteen values of unit k from column n on go
// to dst + place(k, n).
template <class Place>
FASTVIT_INLINE void transpose_units(const char* src, int64_t stride_bytes, int64_t n, int64_t row_bytes, float* dst,
                                    const Place& place) {
  constexpr int64_t unit = sizeof(float);
  const int64_t units = ceil_div(row_bytes, unit);
  for (int64_t col = 0; col < PANEL; col += LANES) {
    for (int64_t k = 0; k < units; k += LANES) {
      f32x16 tile[LANES], turned[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) {
        const char* row = src + (col + i) * stride_bytes + k * unit;
        tile[i] = col + i < n ? load_bytes(row, row_bytes - k * unit) : f32x16{};
      }
      transpose16(tile, turned);
      const int64_t count = std::min(LANES, units - k);
      for (int64_t i = 0; i < count; ++i) store16(dst + place(k + i, col), turned[i]);
    }
  }
}

FASTVIT_INLINE int64_t row_offset(int64_t k, int64_t n) { return k * PANEL + n; }

// Two rows side by side; `odd` may be null.
void copy_row_pair(const c10::BFloat16* even, const c10::BFloat16* odd, int64_t n, float even_scale, float odd_scale,
                   c10::BFloat16* dst) {
  for (int64_t col = 0; col < PANEL; col += LANES) {
    const f32x16 low = n > col ? load_part(even + col, n - col) : f32x16{};
    const f32x16 high = n > col && odd ? load_part(odd + col, n - col) : f32x16{};
    store_pairs(dst + 2 * col, low * even_scale, high * odd_scale);
  }
}

void pack_panel_transposed(const float* src, int64_t stride, int64_t n, int64_t k, float* dst) {
  transpose_units(reinterpret_cast<const char*>(src), stride * sizeof(float), n, k * sizeof(float), dst,
                  [k](int64_t i, int64_t col) { return packed_offset(i, col, k); });
}

void pack_panel_transposed_bf16(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, c10::BFloat16* dst) {
  transpose_units(reinterpret_cast<const char*>(src), stride * 2, n, k * 2, reinterpret_cast<float*>(dst), row_offset);
}

void transpose_panel(const float* src, int64_t stride, int64_t n, int64_t k, float* dst) {
  transpose_units(reinterpret_cast<const char*>(src), stride * sizeof(float), n, k * sizeof(float), dst, row_offset);
}

void pack_panel(const float* src, int64_t stride, int64_t n, int64_t k, const float* scale, float* dst) {
  for (int64_t i = 0; i < k; ++i) {
    const float* row = src + i * stride;
    const f32x16 factor = scale ? scale[i] : 1.0f;
    for (int64_t col = 0; col < PANEL; col += LANES) {
      const f32x16 value = n > col ? load_part(row + col, n - col) : f32x16{};
      store16(dst + packed_offset(i, col, k), value * factor);
    }
  }
}

void pack_panel_bf16(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, const float* scale,
                     c10::BFloat16* dst) {
  for (int64_t i = 0; i < k; i += 2) {
    const bool paired = i + 1 < k;
    copy_row_pair(src + i * stride, paired ? src + (i + 1) * stride : nullptr, n, scale ? scale[i] : 1.0f,
                  scale && paired ? scale[i + 1] : 1.0f, dst + i * PANEL);
  }
}

template <class D>
FASTVIT_INLINE void transpose_rows16_to(const float* src, int64_t width, void* dst, int64_t ld) {
  for (int64_t e = 0; e < width; e += LANES) {
    const int64_t count = std::min(LANES, width - e);
    f32x16 tile[LANES], turned[LANES];
    for (int64_t i = 0; i < LANES; ++i) tile[i] = load_part(src + i * width + e, count);
    transpose16(tile, turned);
    for (int64_t i = 0; i < count; ++i) store16(static_cast<D*>(dst) + (e + i) * ld, turned[i]);
  }
}

template <class D>
FASTVIT_INLINE void store_transposed_as(const TransposedTile& tile) {
  for (int64_t e = 0; e < tile.width; e += LANES) {
    const int64_t count = std::min(LANES, tile.width - e);
    for (int64_t n0 = 0; n0 < tile.columns; n0 += LANES) {
      f32x16 columns[LANES] = {}, rows[LANES];
      for (int64_t i = 0; i < count; ++i) columns[i] = load16(tile.sums + (e + i) * PANEL + n0);
      transpose16(columns, rows);
      for (int64_t n = n0; n < std::min(n0 + LANES, tile.columns); ++n) {
        const float scale = tile.scale ? tile.scale[n] : 1.0f;
        store_part(static_cast<D*>(tile.out) + n * tile.stride + e, rows[n - n0] * scale, count);
      }
    }
  }
}

template <class S>
FASTVIT_INLINE f32x16 dot_row_as(const void* a, const float* b, int64_t n, f32x16 total) {
  for (int64_t i = 0; i < n; i += LANES) {
    total += load_part(static_cast<const S*>(a) + i, n - i) * load_part(b + i, n - i);
  }
  return total;
}

void transpose_rows16(const float* src, int64_t width, void* dst, int64_t ld, at::ScalarType dtype) {
  FASTVIT_BY_DTYPE(dtype, transpose_rows16_to, src, width, dst, ld);
}

void store_transposed(const TransposedTile& tile) { FASTVIT_BY_DTYPE(tile.dtype, store_transposed_as, tile); }

float dot_row(const void* a, at::ScalarType dtype, const float* b, int64_t n) {
  const f32x16 zero{};
  switch (dtype) {
    case at::kBFloat16:
      return sum_lanes(dot_row_as<c10::BFloat16>(a, b, n, zero));
    case at::kHalf:
      return sum_lanes(dot_row_as<c10::Half>(a, b, n, zero));
    default:
      return sum_lanes(dot_row_as<float>(a, b, n, zero));
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
