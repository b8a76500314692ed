// GEMM core: row-major activations times weights packed in panels of 64 columns.
//
// A packed (N, K) weight is [ceil(N / 64)][K][64] in float32, or what the micro-kernel of this machine reads fastest
// (see packed_offset in simd/gemm.h); a multiple of 64 k always starts at 64 * k. In bfloat16 pairs of k lie side by
// side, [ceil(N / 64)][K / 2][64][2], K rounded up to even, which is what the dot-product instructions read.
#pragma once

#include <ATen/ATen.h>

#include "parallel.h"

namespace fastvit::cpu {

constexpr int64_t K_BLOCK = 768;  // k a call: a panel block of 192 KB stays in L2

// The type products are computed in for weights of `dtype`: bfloat16 where the machine has it, else float32.
at::ScalarType compute_dtype(at::ScalarType dtype);
bool has_bf16_gemm();
const char* bf16_gemm_kind();

template <class T>
constexpr int64_t padded_k(int64_t k) {
  return sizeof(T) == 2 ? round_up(k, 2) : k;
}

// Rows of memory beside a product, `bytes` of each; null for none.
struct RowLines {
  const char* data = nullptr;
  int64_t stride = 0, bytes = 0;
};

// C (rows, columns) = A (rows, k) B (k, columns), or += when `accumulate`. C is float32.
template <class T>
struct GemmTile {
  const T* a;
  int64_t lda;
  const T* b;  // a panel
  float* c;
  int64_t ldc, rows, k;  // k even for bfloat16
  bool accumulate;
  int64_t columns = PANEL;  // a multiple of 16
  // A B tile of the same k to fetch into L2 meanwhile, null for none: the weights of a small batch come from memory,
  // and waiting for them would cost a tenth of the time.
  const void* next = nullptr;
  bool packed = true;  // in float32: false for B as rows of 64
  // In float32 products are summed over this many k in registers, then added to C: sums of sums round less.
  int64_t step = 128;
  RowLines written = {}, read = {};  // by the epilogue: fetched as well
};
void gemm_tile(const GemmTile<float>& tile);
void gemm_tile(const GemmTile<c10::BFloat16>& tile);

// The whole k range in blocks. `next` is the panel that will be read after this one.
template <class T>
void gemm_panel(GemmTile<T> tile) {
  const GemmTile<T> all = tile;
  for (int64_t k0 = 0; k0 < all.k; k0 += K_BLOCK) {
    tile.a = all.a + k0;
    tile.b = all.b + k0 * PANEL;
    tile.k = std::min(K_BLOCK, all.k - k0);
    tile.accumulate = all.accumulate || k0 > 0;
    tile.next = k0 + K_BLOCK < all.k ? tile.b + K_BLOCK * PANEL : all.next;
    gemm_tile(tile);
  }
}

// Give back what the bfloat16 kernels hold (AMX tiles); at the end of every task that called gemm_tile.
void release_bf16_gemm();
template <class T>
void gemm_release() {
  if constexpr (sizeof(T) == 2) release_bf16_gemm();
}

// One panel from a weight whose columns (n) are rows in memory: src[n * stride + k].
void pack_panel_transposed(const float* src, int64_t stride, int64_t n, int64_t k, float* dst);
void pack_panel_transposed(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, c10::BFloat16* dst);

// The same as (k, 64) rows, not packed.
void transpose_panel(const float* src, int64_t stride, int64_t n, int64_t k, float* dst);
// Whether packed float32 panels are something else than rows.
bool packs_narrow();

// One panel from rows of k: src[k * stride + n], row k multiplied by scale[k] when given.
void pack_panel(const float* src, int64_t stride, int64_t n, int64_t k, const float* scale, float* dst);
void pack_panel(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, const float* scale, c10::BFloat16* dst);

struct PackedWeight {
  int64_t n = 0, k = 0, panels = 0;
  at::Tensor data;

  template <class T>
  const T* panel(int64_t i) const {
    return static_cast<const T*>(data.const_data_ptr()) + i * padded_k<T>(k) * PANEL;
  }
  int64_t bytes() const { return data.nbytes(); }
};

// Pack an (N, K) weight for x W^T.
PackedWeight pack_weight(const at::Tensor& weight);
// Pack a (K, N) matrix for x (scale * W) in `dtype`; scale (K) or null.
PackedWeight pack_matrix(const at::Tensor& matrix, at::ScalarType dtype, const float* scale = nullptr);
// The tensor in `dtype` with the last dimension contiguous: what the panel packers read.
at::Tensor packable(const at::Tensor& weight, at::ScalarType dtype);

}  // namespace fastvit::cpu
