// Second stages: column sums of the blocks' partial sums, and the gradients around LayerScale.
#include "cuda/common.cuh"

namespace fastvit {

constexpr int kSumCols = 8, kSumRows = 64;

// Block: 8 columns (one 32-byte sector) of one vector; 64 threads share its G partial sums.
__global__ void __launch_bounds__(kSumCols* kSumRows) sum_partials_kernel(SumPartials p) {
  __shared__ float shared[kSumRows][kSumCols];
  const int64_t col = int64_t(blockIdx.x) * kSumCols + threadIdx.x;
  const int vector = blockIdx.y;
  float sum = 0.f;
  if (col < p.cols) {
    for (int group = threadIdx.y; group < p.groups; group += kSumRows) {
      sum += p.partials[(int64_t(group) * p.vectors + vector) * p.stride + col];
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  for (int half = kSumRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) shared[threadIdx.y][threadIdx.x] += shared[threadIdx.y + half][threadIdx.x];
  }
  const Vector out = vector == 0 ? p.out[0] : p.out[1];
  if (threadIdx.y == 0 && col < p.cols && out.data != nullptr) store_param(out, col, shared[0][threadIdx.x]);
}

cudaError_t has_kernels() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(sum_partials_kernel));
  cudaGetLastError();  // an answer, not an error for the next launch to find
  return error;
}

cudaError_t launch_sum_partials(const SumPartials& p, cudaStream_t stream) {
  if (p.cols == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div(p.cols, kSumCols)), p.vectors), block(kSumCols, kSumRows);
  sum_partials_kernel<<<grid, block, 0, stream>>>(p);
  return cudaGetLastError();
}

constexpr int kScaleThreads = 256;

// One output row a block; N columns a thread at a time.
template <typename T, int N>
__global__ void __launch_bounds__(kScaleThreads) layer_scale_bwd_kernel(LayerScaleBwd p) {
  __shared__ float shared[kScaleThreads / kWarp];
  const int64_t row = blockIdx.x;
  const float scale = param<T>(p.layer_scale, row, 1.f);
  float dot[1] = {0.f};
  for (int64_t col = int64_t(threadIdx.x) * N; col < p.cols; col += kScaleThreads * N) {
    float g[N], weight[N];
    load(row_of<const float>(p.g, row) + col, g);
    load(row_of<const T>(p.weight, row) + col, weight);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dot[0] += g[i] * weight[i];
      g[i] *= scale;
    }
    store(row_of<T>(p.dweight, row) + col, g);
  }
  block_sum(dot, shared);
  if (threadIdx.x != 0) return;
  const float sum = p.sums == nullptr ? 0.f : p.sums[row];
  store_param(p.dlayer_scale, row, dot[0] + sum * param<T>(p.bias, row, 0.f));
  if (p.dbias.data != nullptr) store_param(p.dbias, row, sum * scale);
}

cudaError_t launch_layer_scale_bwd(const LayerScaleBwd& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool vectors = p.cols % kVec == 0 && aligned(p.g) && aligned(p.weight) && aligned(p.dweight);
  return with_type(p.weight.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (vectors) {
      layer_scale_bwd_kernel<T, kVec><<<p.rows, kScaleThreads, 0, stream>>>(p);
    } else {
      layer_scale_bwd_kernel<T, 1><<<p.rows, kScaleThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace fastvit
