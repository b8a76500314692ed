// LayerNorm folded into the linear layer after it: the weight scaled and rounded, its row sums, and the shifted bias.
#include "cuda/common.cuh"

namespace fastvit {

constexpr int kFoldThreads = 128;

// One output feature a block; N columns a thread at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kFoldThreads) fold_norm_kernel(FoldNorm p) {
  __shared__ float shared[2 * kFoldThreads / kWarp];
  const int64_t row = blockIdx.x;
  float total[2] = {};  // of the rounded weights, and of weight * norm_bias
  for (int64_t col = int64_t(threadIdx.x) * N; col < p.cols; col += kFoldThreads * N) {
    float weight[N], scale[N], shift[N];
    load(row_of<const T>(p.weight, row) + col, weight);
    load_param<T>(p.norm_weight, col, 1.f, scale);
    load_param<T>(p.norm_bias, col, 0.f, shift);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total[1] += weight[i] * shift[i];
      weight[i] = to_float(from_float<T>(weight[i] * scale[i]));
      total[0] += weight[i];
    }
    store(row_of<T>(p.folded, row) + col, weight);
  }
  block_sum(total, shared);
  if (threadIdx.x != 0) return;
  p.sums[row] = total[0];
  p.shift[row] = total[1] + param<T>(p.bias, row, 0.f);
}

cudaError_t launch_fold_norm(const FoldNorm& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool vectors =
      p.cols % kVec == 0 && aligned(p.weight) && aligned(p.folded) && aligned(p.norm_weight) && aligned(p.norm_bias);
  return with_type(p.weight.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (vectors) {
      fold_norm_kernel<T, kVec><<<p.rows, kFoldThreads, 0, stream>>>(p);
    } else {
      fold_norm_kernel<T, 1><<<p.rows, kFoldThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace fastvit
