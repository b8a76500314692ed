// The micro-kernels: a few rows of A times 16 to 64 columns of a panel, with all sums in registers.
#pragma once

#include "vector.h"

namespace fastvit::cpu::FASTVIT_ISA {

// The register file decides the tile: 32 x 512 bits hold 6 x 64 floats, 16 x 256 bits 6 x 16, 16 x 128 bits 2 x 16.
#if defined(__aarch64__)
constexpr int GEMM_ROWS = 6;
#else
constexpr int GEMM_ROWS = REGISTER == 4 ? 2 : 6;
#endif
constexpr int GEMM_VECTORS = REGISTER == 16 ? 4 : 1;
constexpr int64_t GEMM_COLUMNS = GEMM_VECTORS * LANES;
constexpr int64_t L1_K = GEMM_VECTORS == 4 ? K_BLOCK : K_BLOCK / 2;  // so that narrow columns of B stay in L1

// Offset of (k, n) in a packed panel of `size` k, and the distance to (k + 1, n). Narrow tiles want their columns side
// by side: [ceil(k / 64)][4][64][16] instead of [k][64].
FASTVIT_INLINE int64_t packed_offset(int64_t k, int64_t n, int64_t size) {
  if constexpr (GEMM_COLUMNS == PANEL) return k * PANEL + n;
  const int64_t block = k / PANEL * PANEL, count = std::min(PANEL, size - block);
  return block * PANEL + n / GEMM_COLUMNS * GEMM_COLUMNS * count + (k - block) * GEMM_COLUMNS + n % GEMM_COLUMNS;
}

// The part of the next tile that is fetched along with one micro tile, a line or two for every few steps of k: many at
// once keep the loads of this tile waiting. Into L1, since the weaker hints may stop at a page whose address is not
// known.
class Fetch {
 public:
  static constexpr int64_t GROUP = 8;  // steps of k

  template <class T>
  FASTVIT_INLINE Fetch(const GemmTile<T>& t, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       int64_t steps) {
    if (column == 0) written_ = from_row(t.written, row), read_ = from_row(t.read, row), rows_ = rows;
    if (!t.next) return;
    const int64_t all = t.k * PANEL * static_cast<int64_t>(sizeof(T)) / CACHE_LINE, area = t.rows * t.columns;
    const int64_t before = column * t.rows + row * columns;
    const char* lines = static_cast<const char*>(t.next);
    at_ = lines + all * before / area * CACHE_LINE;
    end_ = lines + all * (before + rows * columns) / area * CACHE_LINE;
    share_ = ceil_div((end_ - at_) / CACHE_LINE * GROUP, steps);
  }

  FASTVIT_INLINE void step() {
    if (rows_ > 0) {
      fetch_row(written_);
      fetch_row(read_);
      --rows_;
    }
    for (int64_t i = 0; i < share_ && at_ < end_; ++i, at_ += CACHE_LINE) __builtin_prefetch(at_, 0, 3);
  }

 private:
  static FASTVIT_INLINE RowLines from_row(const RowLines& rows, int64_t i) {
    return {rows.data + i * rows.stride, rows.stride, rows.bytes};
  }
  static FASTVIT_INLINE void fetch_row(RowLines& rows) {
    for (int64_t i = 0; i < rows.bytes; i += CACHE_LINE) __builtin_prefetch(rows.data + i, 0, 3);
    rows.data += rows.stride;
  }

  RowLines written_, read_;
  int64_t rows_ = 0;  // of them, left
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t share_ = 0;  // lines a group
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

// acc += A (ROWS, count) B (count, 16 * VECTORS)
template <int ROWS, int VECTORS>
FASTVIT_INLINE void multiply(f32x16 (&acc)[ROWS][VECTORS], const float* a, int64_t lda, const float* b, int64_t ldb,
                             int64_t count, Fetch& fetch) {
  for (int64_t k0 = 0; k0 < count; k0 += Fetch::GROUP) {
    fetch.step();
    const int64_t end = std::min(count, k0 + Fetch::GROUP);
    for (int64_t k = k0; k < end; ++k) {
      f32x16 row[VECTORS];
      for (int v = 0; v < VECTORS; ++v) row[v] = load16(b + k * ldb + v * LANES);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        const f32x16 left = a[i * lda + k];
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = acc[i][v] + left * row[v];
      }
    }
  }
}

// ROWS x (16 * VECTORS) of C from row `r` and column `n` on.
template <int ROWS, int VECTORS>
FASTVIT_INLINE void micro_tile(const GemmTile<float>& t, int64_t r, int64_t n) {
  Fetch fetch(t, r, ROWS, n, VECTORS * LANES, t.k);
  const float* a = t.a + r * t.lda;
  for (int64_t k0 = 0; k0 < t.k; k0 += t.step) {
    const int64_t end = std::min(t.k, k0 + t.step);
    f32x16 acc[ROWS][VECTORS] = {};
    if (GEMM_COLUMNS == PANEL || !t.packed) {
      multiply(acc, a + k0, t.lda, t.b + k0 * PANEL + n, PANEL, end - k0, fetch);
    } else {
      for (int64_t k = k0; k < end;) {
        const int64_t count = std::min(end, (k / PANEL + 1) * PANEL) - k;
        multiply(acc, a + k, t.lda, t.b + packed_offset(k, n, t.k), GEMM_COLUMNS, count, fetch);
        k += count;
      }
    }
    store_tile<ROWS, VECTORS>(acc, t.c + r * t.ldc + n, t.ldc, t.accumulate || k0 > 0);
  }
}

#if FASTVIT_HAS_DOT_PAIRS
// acc[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] of bfloat16 pairs. The intrinsic would bind the templates to one target.
FASTVIT_INLINE f32x16 dot_pairs(f32x16 acc, f32x16 a, f32x16 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.part[0]) : "v"(a.part[0]), "v"(b.part[0]));
  return acc;
}

// As above with pairs of k: one of A is broadcast and multiplied with 16 of B.
template <int ROWS, int VECTORS>
FASTVIT_INLINE void micro_tile(const GemmTile<c10::BFloat16>& t, int64_t r, int64_t n) {
  const int64_t pairs = t.k / 2;
  Fetch fetch(t, r, ROWS, n, VECTORS * LANES, pairs);
  const c10::BFloat16 *a = t.a + r * t.lda, *b = t.b + 2 * n;
  f32x16 acc[ROWS][VECTORS] = {};
  for (int64_t k0 = 0; k0 < pairs; k0 += Fetch::GROUP) {
    fetch.step();
    const int64_t end = std::min(pairs, k0 + Fetch::GROUP);
    for (int64_t k = k0; k < end; ++k) {
      f32x16 row[VECTORS];
      for (int v = 0; v < VECTORS; ++v)
        row[v] = load16(reinterpret_cast<const float*>(b + (k * PANEL + v * LANES) * 2));
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        uint32_t pair;
        __builtin_memcpy(&pair, a + i * t.lda + 2 * k, sizeof(pair));
        const f32x16 left = from_bits(pair);
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = dot_pairs(acc[i][v], left, row[v]);
      }
    }
  }
  store_tile<ROWS, VECTORS>(acc, t.c + r * t.ldc + n, t.ldc, t.accumulate);
}
#endif

// `count` <= ROWS rows from row `r` on.
template <int ROWS, int VECTORS, class T>
FASTVIT_INLINE void micro_rows(const GemmTile<T>& t, int64_t r, int64_t n, int64_t count) {
  if constexpr (ROWS > 1) {
    if (count < ROWS) return micro_rows<ROWS - 1, VECTORS>(t, r, n, count);
  }
  micro_tile<ROWS, VECTORS>(t, r, n);
}

// The fewest tiles of at most ROWS rows, as equal as they can be: a tile of one or two rows waits for B.
template <int ROWS, int VECTORS, class T>
FASTVIT_INLINE void micro_columns(const GemmTile<T>& t, int64_t n) {
  const int64_t tiles = ceil_div(t.rows, ROWS);
  for (int64_t i = 0; i < tiles; ++i) {
    const Range rows = piece(t.rows, tiles, i);
    micro_rows<ROWS, VECTORS>(t, rows.begin, n, rows.size());
  }
}

template <class T>
FASTVIT_INLINE void micro_gemm(const GemmTile<T>& t) {
  int64_t n = 0;
  for (; n + GEMM_COLUMNS <= t.columns; n += GEMM_COLUMNS) micro_columns<GEMM_ROWS, GEMM_VECTORS>(t, n);
  if constexpr (GEMM_VECTORS == 4) {  // fewer columns leave registers for more rows
    const int64_t left = t.columns - n;
    if (left == 3 * LANES) micro_columns<8, 3>(t, n);
    if (left == 2 * LANES) micro_columns<12, 2>(t, n);
    if (left == LANES) micro_columns<12, 1>(t, n);
  }
}

void gemm_fp32(const GemmTile<float>& tile) {
  GemmTile<float> part = tile;
  for (int64_t k = 0; k < tile.k; k += L1_K) {
    part.a = tile.a + k;
    part.b = tile.b + k * PANEL;
    part.k = std::min(L1_K, tile.k - k);
    part.accumulate = tile.accumulate || k > 0;
    part.next = tile.next ? static_cast<const float*>(tile.next) + k * PANEL : nullptr;
    micro_gemm(part);
  }
}

#if FASTVIT_HAS_DOT_PAIRS
void gemm_bf16(const GemmTile<c10::BFloat16>& tile) { micro_gemm(tile); }
#endif

}  // namespace fastvit::cpu::FASTVIT_ISA
