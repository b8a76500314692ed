// The forward GEMM over rows, normalised or as they are, with an epilogue on every 64-column tile.
#pragma once

#include "epilogue.h"
#include "gemm.h"
#include "rows.h"

namespace fastvit::cpu {

// LayerNorm applied to the rows as they are read; absent (weight null) for a plain linear.
struct Norm {
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
  float *mean = nullptr, *rstd = nullptr;  // (M) results
};

template <class T>
struct Operand {
  const T* data;
  int64_t ld;
};

// Row stride of operands in scratch: 64 bytes beyond a round size, so that rows do not share cache sets.
template <class T>
constexpr int64_t operand_ld(int64_t k) {
  return round_up(k, CACHE_LINE / sizeof(T)) + CACHE_LINE / sizeof(T);
}

// (rows, K) in T, normalised where asked; in place when the rows can be used as they are.
template <class T>
Operand<T> load_operand(const Rows& x, const Norm& norm, Range rows, Scratch& scratch) {
  if (!norm.weight && x.usable_as<T>()) return {static_cast<const T*>(x.row(rows.begin)), x.stride()};
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t ld = operand_ld<T>(x.width);
  T* operand = scratch.take<T>(rows.size() * ld);
  float* buffer = scratch.take<float>(x.width);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    T* out = operand + (i - rows.begin) * ld;
    if (norm.weight) {
      const float* row = x.as_float(i, buffer);
      const Statistics stats = row_statistics(row, x.width, norm.eps);
      // With few rows each group of panels normalises them for itself: several threads write the same values here.
      std::atomic_ref(norm.mean[i]).store(stats.mean, std::memory_order_relaxed);
      std::atomic_ref(norm.rstd[i]).store(stats.rstd, std::memory_order_relaxed);
      normalize_row(row, x.width, stats, norm.weight, norm.bias, out, dtype);
    } else {
      scale_row(x.row(i), x.dtype(), x.width, 1.0f, out, dtype);
    }
    for (int64_t k = x.width; k < padded_k<T>(x.width); ++k) out[k] = 0.0f;
  }
  return {operand, ld};
}

// Tasks of a GEMM: row blocks x groups of panels.
struct Grid {
  int64_t row_blocks, panel_groups;
};
Grid plan_grid(int64_t rows, int64_t panels);

// Row blocks for work that needs all columns of a row.
int64_t plan_row_blocks(int64_t rows);

// Columns of panel `p` that exist.
inline int64_t panel_columns(const PackedWeight& weight, int64_t p) { return std::min(PANEL, weight.n - p * PANEL); }

// Where panel `p` of these rows lies in a row-major tensor.
inline const void* tile_at(const Rows& rows, int64_t first_row, int64_t p) {
  return static_cast<const char*>(rows.row(first_row)) + p * PANEL * rows.tensor.element_size();
}
inline TileTarget target_at(const Rows& rows, int64_t first_row, int64_t p) {
  char* row = static_cast<char*>(rows.mutable_row(first_row));
  return {row + p * PANEL * rows.tensor.element_size(), rows.stride(), rows.dtype()};
}

// Panel `p` of what an epilogue reads or writes; null for nothing.
inline RowLines lines_at(const Rows* rows, int64_t first_row, int64_t p) {
  if (!rows) return {};
  const int64_t item = rows->tensor.element_size();
  const void* data = tile_at(*rows, first_row, p);
  return {static_cast<const char*>(data), rows->stride() * item, std::min(PANEL, rows->width - p * PANEL) * item};
}

// For every tile: store(products (rows, 64) with row stride 64, rows, panel). load(rows, scratch) gives the operand;
// `written` and `read` are fetched for the store.
template <class T, class Load, class Store>
void run_gemm(int64_t count, const PackedWeight& weight, const Load& load, const Store& store,
              const Rows* written = nullptr, const Rows* read = nullptr) {
  const Grid grid = plan_grid(count, weight.panels);
  parallel_tasks(grid.row_blocks * grid.panel_groups, [&](int64_t task) {
    const Range rows = piece(count, grid.row_blocks, task / grid.panel_groups);
    const Range panels = piece(weight.panels, grid.panel_groups, task % grid.panel_groups);
    Scratch scratch;
    float* products = scratch.take<float>(rows.size() * PANEL);
    const Operand<T> a = load(rows, scratch);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const T* next = p + 1 < panels.end ? weight.panel<T>(p + 1) : nullptr;
      GemmTile<T> tile{a.data, a.ld, weight.panel<T>(p), products, PANEL, rows.size(), padded_k<T>(weight.k), false,
                       PANEL,  next};
      tile.written = lines_at(written, rows.begin, p);
      tile.read = lines_at(read, rows.begin, p);
      gemm_panel<T>(tile);
      store(products, rows, p);
    }
    gemm_release<T>();
  });
}

template <class T, class Store>
void run_linear(const Rows& x, const Norm& norm, const PackedWeight& weight, const Store& store,
                const Rows* written = nullptr, const Rows* read = nullptr) {
  run_gemm<T>(
      x.count, weight, [&](Range rows, Scratch& scratch) { return load_operand<T>(x, norm, rows, scratch); }, store,
      written, read);
}

// Call run(T{}) with the C++ type of a compute dtype.
template <class Run>
void with_compute_type(at::ScalarType dtype, const Run& run) {
  if (dtype == at::kFloat) {
    run(float{});
  } else {
    run(c10::BFloat16{});
  }
}

}  // namespace fastvit::cpu
