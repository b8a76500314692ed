// The sums of a tile's columns by one warpgroup, each in one order: a thread's rows, the rows of a warp, the warps.
#pragma once

#include "cuda/common.cuh"

namespace fastvit::sm90 {

// As a product's results lie (hopper_layouts.h in tests): 16 rows a warp, of which a thread has two, 8 apart, and two
// columns of every 8. Four lanes share a row.
template <int COLS>
struct ColumnSums {
  static constexpr int kWarps = 4, kColumns = 32, kKept = kColumns / 4;  // columns at a time; of them, a thread's
  struct Storage {
    float sums[kWarps][COLS];
  };

  float kept[kKept] = {};

  // `column` counts from the thread's first.
  __device__ void add(int column, float value) { kept[column / 8 * 2 + column % 2] += value; }

  // The 32 columns from `first` on are complete in every thread. Eight lanes have eight columns of other rows each:
  // every exchange leaves a lane half of the columns, over twice the rows.
  __device__ void fold(Storage& storage, int thread, int first) {
    const int lane = thread % kWarp, row = lane / 4;
#pragma unroll
    for (int half = kKept / 2; half > 0; half /= 2) {
      const bool upper = row & half;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float got = __shfl_xor_sync(0xffffffffu, upper ? kept[i] : kept[i + half], 4 * half);
        kept[i] = (upper ? kept[i + half] : kept[i]) + got;
      }
    }
    storage.sums[thread / kWarp][first + row / 2 * 8 + row % 2 + lane % 4 * 2] = kept[0];
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = 0.f;
  }

  // After a barrier of the warpgroup.
  __device__ static void finish(const Storage& storage, int thread, float* sums) {
    const auto& of = storage.sums;
    for (int i = thread; i < COLS; i += kWarps * kWarp) sums[i] = (of[0][i] + of[1][i]) + (of[2][i] + of[3][i]);
  }
};

}  // namespace fastvit::sm90
