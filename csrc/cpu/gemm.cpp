#include "gemm.h"

#include <ATen/native/CPUBlas.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#endif

#include "simd.h"

namespace fastvit::cpu {
namespace {

// Products are summed over this many k in registers, then added to C: sums of sums round less than one long sum.
constexpr int64_t K_STEP = 128;

template <class T>
struct Tile {
  const T* a;
  int64_t lda;
  const T* b;
  float* c;
  int64_t ldc, rows, k, columns;
  bool accumulate;
  const char* next;
};

// The part of the next tile that is fetched along with one micro tile, in shares between its steps of k.
struct Fetch {
  const char* from = nullptr;
  int64_t lines = 0;

  template <class T>
  FASTVIT_INLINE Fetch(const Tile<T>& t, int64_t row, int64_t rows) {
    if (!t.next) return;
    const int64_t all = t.k * PANEL * static_cast<int64_t>(sizeof(T)) / CACHE_LINE, first = all * row / t.rows;
    from = t.next + first * CACHE_LINE;
    lines = all * (row + rows) / t.rows - first;
  }

  FASTVIT_INLINE void step(int64_t done, int64_t now, int64_t total) {
    if (lines == 0) return;
    const int64_t end = lines * (done + now) / total;
    for (int64_t i = lines * done / total; i < end; ++i) __builtin_prefetch(from + i * CACHE_LINE, 0, 2);
  }
};

template <int ROWS, int VECTORS>
FASTVIT_INLINE void store_tile(const f32x16 (&acc)[ROWS][VECTORS], float* c, int64_t ldc, bool add) {
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + i * ldc + v * LANES;
      store16(at, add ? load16(at) + acc[i][v] : acc[i][v]);
    }
  }
}

// ROWS x (16 * VECTORS) of C from row `r` and column `n` on.
template <int ROWS, int VECTORS>
FASTVIT_INLINE void micro_tile(const Tile<float>& t, int64_t r, int64_t n) {
  Fetch fetch(t, r, ROWS);
  for (int64_t k0 = 0; k0 < t.k; k0 += K_STEP) {
    const int64_t count = std::min(K_STEP, t.k - k0);
    const float* a = t.a + r * t.lda + k0;
    const float* b = t.b + k0 * PANEL + n;
    fetch.step(k0, count, t.k);
    f32x16 acc[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < count; ++k) {
      f32x16 row[VECTORS];
      for (int v = 0; v < VECTORS; ++v) row[v] = load16(b + k * PANEL + v * LANES);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < VECTORS; ++v) acc[i][v] += a[i * t.lda + k] * row[v];
      }
    }
    store_tile<ROWS, VECTORS>(acc, t.c + r * t.ldc + n, t.ldc, t.accumulate || k0 > 0);
  }
}

template <int ROWS, int VECTORS>
FASTVIT_INLINE void micro_tile(const Tile<c10::BFloat16>& t, int64_t r, int64_t n);

template <int ROWS, int VECTORS, class T>
FASTVIT_INLINE void micro_columns(const Tile<T>& t, int64_t n) {
  int64_t r = 0;
  for (; r + ROWS <= t.rows; r += ROWS) micro_tile<ROWS, VECTORS>(t, r, n);
  for (; r + 2 <= t.rows; r += 2) micro_tile<2, VECTORS>(t, r, n);
  if (r < t.rows) micro_tile<1, VECTORS>(t, r, n);
}

template <int ROWS, int VECTORS, class T>
FASTVIT_INLINE void micro_gemm(const Tile<T>& t) {
  constexpr int64_t width = VECTORS * LANES;
  int64_t n = 0;
  for (; n + width <= t.columns; n += width) micro_columns<ROWS, VECTORS>(t, n);
  if constexpr (VECTORS == 4) {  // fewer columns leave registers for more rows
    const int64_t left = t.columns - n;
    if (left == 3 * LANES) micro_columns<8, 3>(t, n);
    if (left == 2 * LANES) micro_columns<12, 2>(t, n);
    if (left == LANES) micro_columns<12, 1>(t, n);
  }
}

using Fp32Gemm = void (*)(const Tile<float>&);

// The register file decides the tile: 32 x 512 bits hold 6 x 64 floats, 16 x 256 bits 6 x 16, 16 x 128 bits 2 x 16.
#if defined(__x86_64__) && defined(__linux__)
__attribute__((target("arch=x86-64-v4"))) void gemm_avx512(const Tile<float>& t) { micro_gemm<6, 4>(t); }
__attribute__((target("arch=x86-64-v3"))) void gemm_avx2(const Tile<float>& t) { micro_gemm<6, 1>(t); }
bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
bool has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }
#else
constexpr Fp32Gemm gemm_avx512 = nullptr, gemm_avx2 = nullptr;
bool has_avx512() { return false; }
bool has_avx2() { return false; }
#endif
void gemm_baseline(const Tile<float>& t) { micro_gemm<2, 1>(t); }

const Fp32Gemm fp32_gemm = has_avx512() ? gemm_avx512 : has_avx2() ? gemm_avx2 : gemm_baseline;

#if defined(__x86_64__) && defined(__linux__)
// acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] of bfloat16 pairs. The intrinsic would bind the templates to one target.
FASTVIT_INLINE f32x16 dot_pairs(f32x16 acc, f32x16 a, f32x16 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

// As above with pairs of k: one of A is broadcast and multiplied with 16 of B.
template <int ROWS, int VECTORS>
FASTVIT_INLINE void micro_tile(const Tile<c10::BFloat16>& t, int64_t r, int64_t n) {
  constexpr int64_t PAIR_STEP = 64;
  Fetch fetch(t, r, ROWS);
  const int64_t pairs = t.k / 2;
  const c10::BFloat16 *a = t.a + r * t.lda, *b = t.b + 2 * n;
  f32x16 acc[ROWS][VECTORS] = {};
  for (int64_t k0 = 0; k0 < pairs; k0 += PAIR_STEP) {
    const int64_t end = std::min(pairs, k0 + PAIR_STEP);
    fetch.step(k0, end - k0, pairs);
    for (int64_t k = k0; k < end; ++k) {
      f32x16 row[VECTORS];
      for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(&row[v], b + (k * PANEL + v * LANES) * 2, sizeof(f32x16));
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        uint32_t pair;
        __builtin_memcpy(&pair, a + i * t.lda + 2 * k, sizeof(pair));
        const f32x16 left = from_bits(u32x16{} + pair);
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = dot_pairs(acc[i][v], left, row[v]);
      }
    }
  }
  store_tile<ROWS, VECTORS>(acc, t.c + r * t.ldc + n, t.ldc, t.accumulate);
}

__attribute__((target("arch=x86-64-v4"))) void gemm_avx512bf16(const Tile<c10::BFloat16>& t) { micro_gemm<6, 4>(t); }
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
void gemm_avx512bf16(const Tile<c10::BFloat16>&) {}
bool has_avx512bf16() { return false; }
#endif

// Matrix tiles (AMX) outrun any vector unit; PyTorch's kernels know how to use them.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
  return false;
#endif
}

// oneDNN may be built without these kernels, or refuse this machine: ask it for one small product.
bool probe_bf16_gemm() {
  c10::BFloat16 a[4], b[2 * PANEL * 2];
  float c[2 * PANEL];
  for (auto& value : a) value = 1.0f;
  for (auto& value : b) value = 2.0f;
  try {
    at::native::cpublas::brgemm(2, PANEL, 2, 2, PANEL, PANEL, false, a, b, c, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  for (float value : c) {
    if (value != 4.0f) return false;
  }
  return true;
}

// dst (units, 64) = src (n, row_bytes) transposed in units of four bytes: a float, or a pair of bfloat16. What is
// missing of the last unit of a row, and missing columns, become zero.
FASTVIT_CLONES void transpose_units(const char* src, int64_t stride_bytes, int64_t n, int64_t row_bytes, float* dst) {
  constexpr int64_t unit = sizeof(float);
  const int64_t units = ceil_div(row_bytes, unit);
  for (int64_t col = 0; col < PANEL; col += LANES) {
    for (int64_t k = 0; k < units; k += LANES) {
      f32x16 tile[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) {
        const char* row = src + (col + i) * stride_bytes + k * unit;
        tile[i] = col + i < n ? load_bytes(row, row_bytes - k * unit) : f32x16{};
      }
      transpose16(tile);
      const int64_t count = std::min(LANES, units - k);
      for (int64_t i = 0; i < count; ++i) store16(dst + (k + i) * PANEL + col, tile[i]);
    }
  }
}

FASTVIT_CLONES void copy_row(const float* src, int64_t n, float scale, float* dst) {
  for (int64_t col = 0; col < PANEL; col += LANES) {
    const f32x16 value = n > col ? load_part(src + col, n - col) : f32x16{};
    store16(dst + col, value * scale);
  }
}

// Two rows side by side; `odd` may be null.
FASTVIT_CLONES void copy_row_pair(const c10::BFloat16* even, const c10::BFloat16* odd, int64_t n, float even_scale,
                                  float odd_scale, c10::BFloat16* dst) {
  for (int64_t col = 0; col < PANEL; col += LANES) {
    const f32x16 low = n > col ? load_part(even + col, n - col) : f32x16{};
    const f32x16 high = n > col && odd ? load_part(odd + col, n - col) : f32x16{};
    const u32x16 pair = bf16_bits(low * even_scale) | bf16_bits(high * odd_scale) << 16;
    __builtin_memcpy(dst + 2 * col, &pair, sizeof(pair));
  }
}

template <class T, class Pack>
PackedWeight pack_panels(const at::Tensor& source, int64_t n, int64_t k, const Pack& pack) {
  PackedWeight packed{n, k, ceil_div(n, PANEL), {}};
  packed.data = at::empty({packed.panels, padded_k<T>(k), PANEL}, source.options());
  T* dst = packed.data.data_ptr<T>();
  parallel_tasks(packed.panels, [&](int64_t i) {
    pack(source.const_data_ptr<T>(), i * PANEL, std::min(PANEL, n - i * PANEL), dst + i * padded_k<T>(k) * PANEL);
  });
  return packed;
}

template <class T>
PackedWeight pack_weight_as(const at::Tensor& weight) {
  const int64_t stride = weight.stride(0), k = weight.size(1);
  return pack_panels<T>(weight, weight.size(0), k, [&](const T* src, int64_t n0, int64_t n, T* dst) {
    pack_panel_transposed(src + n0 * stride, stride, n, k, dst);
  });
}

template <class T>
PackedWeight pack_matrix_as(const at::Tensor& matrix, const float* scale) {
  const int64_t stride = matrix.stride(0), k = matrix.size(0);
  return pack_panels<T>(matrix, matrix.size(1), k, [&](const T* src, int64_t n0, int64_t n, T* dst) {
    pack_panel(src + n0, stride, n, k, scale, dst);
  });
}

}  // namespace

bool use_brgemm() {
  static const bool available = has_amx() && probe_bf16_gemm();
  return available && at::globalContext().userEnabledMkldnn();
}

const char* bf16_gemm_kind() { return use_brgemm() ? "brgemm" : has_avx512bf16() ? "avx512bf16" : "fp32"; }

bool has_bf16_gemm() { return use_brgemm() || has_avx512bf16(); }

const char* fp32_gemm_kind() { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "baseline"; }

at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && has_bf16_gemm() ? at::kBFloat16 : at::kFloat;
}

void gemm_tile(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t rows, int64_t k,
               bool accumulate, int64_t columns, const void* next) {
  fp32_gemm({a, lda, b, c, ldc, rows, k, columns, accumulate, static_cast<const char*>(next)});
}

void gemm_tile(const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b, float* c, int64_t ldc, int64_t rows,
               int64_t k, bool accumulate, int64_t columns, const void* next) {
  if (use_brgemm()) {
    at::native::cpublas::brgemm(rows, columns, k, lda, PANEL, ldc, accumulate, a, b, c, true);
  } else {
    gemm_avx512bf16({a, lda, b, c, ldc, rows, k, columns, accumulate, static_cast<const char*>(next)});
  }
}

void release_bf16_gemm() {
  if (use_brgemm()) at::native::cpublas::brgemm_release(true);
}

void pack_panel_transposed(const float* src, int64_t stride, int64_t n, int64_t k, float* dst) {
  transpose_units(reinterpret_cast<const char*>(src), stride * sizeof(float), n, k * sizeof(float), dst);
}

void pack_panel_transposed(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, c10::BFloat16* dst) {
  transpose_units(reinterpret_cast<const char*>(src), stride * 2, n, k * 2, reinterpret_cast<float*>(dst));
}

void pack_panel(const float* src, int64_t stride, int64_t n, int64_t k, const float* scale, float* dst) {
  for (int64_t i = 0; i < k; ++i) copy_row(src + i * stride, n, scale ? scale[i] : 1.0f, dst + i * PANEL);
}

void pack_panel(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, const float* scale,
                c10::BFloat16* dst) {
  for (int64_t i = 0; i < k; i += 2) {
    const bool paired = i + 1 < k;
    copy_row_pair(src + i * stride, paired ? src + (i + 1) * stride : nullptr, n, scale ? scale[i] : 1.0f,
                  scale && paired ? scale[i + 1] : 1.0f, dst + i * PANEL);
  }
}

FASTVIT_CLONES void pack_pairs(const float* tile, int64_t k, c10::BFloat16* dst) {
  for (int64_t i = 0; i < k; i += 2) {
    for (int64_t col = 0; col < PANEL; col += LANES) {
      const f32x16 low = load16(tile + i * PANEL + col);
      const f32x16 high = i + 1 < k ? load16(tile + (i + 1) * PANEL + col) : f32x16{};
      const u32x16 pair = bf16_bits(low) | bf16_bits(high) << 16;
      __builtin_memcpy(dst + i * PANEL + 2 * col, &pair, sizeof(pair));
    }
  }
}

at::Tensor packable(const at::Tensor& weight, at::ScalarType dtype) {
  const at::Tensor converted = weight.to(dtype);
  return converted.stride(1) == 1 ? converted : converted.contiguous();
}

PackedWeight pack_weight(const at::Tensor& weight) {
  const at::Tensor source = packable(weight, compute_dtype(weight.scalar_type()));
  return source.scalar_type() == at::kFloat ? pack_weight_as<float>(source) : pack_weight_as<c10::BFloat16>(source);
}

PackedWeight pack_matrix(const at::Tensor& matrix, at::ScalarType dtype, const float* scale) {
  const at::Tensor source = packable(matrix, dtype);
  return dtype == at::kFloat ? pack_matrix_as<float>(source, scale) : pack_matrix_as<c10::BFloat16>(source, scale);
}

}  // namespace fastvit::cpu
