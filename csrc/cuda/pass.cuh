// One skeleton for every pass over an (M, C) matrix that works element by element and may sum its columns.
//
// Block: 32 lanes of N columns, 8 rows at a time; grid: (column blocks, G). An Op has
//   kMaySum                                      whether it ever adds to the column sums
//   Columns columns(col)                         what stays the same down a column
//   Loaded load(row, col)                        what an element needs from memory; a row is loaded before it is
//                                                stored, so outputs may overwrite inputs
//   void run(row, col, loaded, columns, sums)    compute, store, add to the column sums
#pragma once

#include "cuda/common.cuh"

namespace fastvit {

constexpr int kPassRows = 8;  // warps of a block, one row each
constexpr int kPassThreads = kPassRows * kWarp;
constexpr int kBlocksPerSm = 16;  // a few waves of blocks, so that the last wave is a small part

// Rows a thread has in flight: as many bytes for every dtype.
template <typename Op>
constexpr int kUnroll = sizeof(typename Op::Loaded) > 48 ? 1 : 2;

template <int N, bool SUMS, typename Op>
__global__ void __launch_bounds__(kPassThreads, 3) pass_kernel(Op op, Pass p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t col = (int64_t(blockIdx.x) * kWarp + lane) * N;
  const int64_t rows_per_group = (p.rows + p.groups - 1) / p.groups;
  const int64_t begin = blockIdx.y * rows_per_group;
  const int64_t end = min(begin + rows_per_group, p.rows);
  const bool inside = col < p.cols;

  float sums[N] = {};
  if (inside) {
    const auto columns = op.columns(col);
    for (int64_t first = begin + warp; first < end; first += kPassRows * kUnroll<Op>) {
      typename Op::Loaded loaded[kUnroll<Op>];
#pragma unroll
      for (int u = 0; u < kUnroll<Op>; ++u) {
        if (first + u * kPassRows < end) loaded[u] = op.load(first + u * kPassRows, col);
      }
#pragma unroll
      for (int u = 0; u < kUnroll<Op>; ++u) {
        if (first + u * kPassRows < end) op.run(first + u * kPassRows, col, loaded[u], columns, sums);
      }
    }
  }
  if constexpr (SUMS) {
    __shared__ float shared[kPassRows][N][kWarp];
#pragma unroll
    for (int i = 0; i < N; ++i) shared[warp][i][lane] = sums[i];
    __syncthreads();
    if (warp != 0 || !inside) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      for (int other = 1; other < kPassRows; ++other) sums[i] += shared[other][i][lane];
    }
    store(p.partials + blockIdx.y * p.cols + col, sums);
  }
}

template <int N, typename Op>
cudaError_t launch_pass(const Op& op, const Pass& p, cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div(p.cols, N * kWarp)), p.groups);
  if constexpr (Op::kMaySum) {
    if (p.partials != nullptr) {
      pass_kernel<N, true><<<grid, kPassThreads, 0, stream>>>(op, p);
      return cudaGetLastError();
    }
  }
  pass_kernel<N, false><<<grid, kPassThreads, 0, stream>>>(op, p);
  return cudaGetLastError();
}

}  // namespace fastvit
