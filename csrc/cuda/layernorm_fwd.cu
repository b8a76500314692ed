// LayerNorm forward, one pass over memory: a row stays in registers, eight columns a thread.
#include "cuda/common.cuh"

namespace fastvit {

constexpr int kMaxThreads = 512;  // so rows up to 4096 columns are held by one block
constexpr int kRows = 4;          // rows a block has in flight: one barrier serves them all
constexpr int kAnyThreads = 256;

template <typename X, typename Y>
__global__ void __launch_bounds__(kMaxThreads) layernorm_fwd_kernel(LayerNormFwd p) {
  __shared__ float sums[2][kRows * kMaxThreads / kWarp];
  const int col = threadIdx.x * kVec;
  const bool inside = col < p.cols;
  const int64_t first = int64_t(blockIdx.x) * kRows;

  float x[kRows][kVec] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (inside && first + r < p.rows) load(row_of<const X>(p.x, first + r) + col, x[r]);
  }
  float mean[kRows], rstd[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    mean[r] = 0.f;
#pragma unroll
    for (int i = 0; i < kVec; ++i) mean[r] += x[r][i];
  }
  block_sum(mean, sums[0]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    mean[r] /= p.cols;
    rstd[r] = 0.f;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float centred = x[r][i] - mean[r];
      rstd[r] += inside ? centred * centred : 0.f;
    }
  }
  block_sum(rstd, sums[1]);

  float weight[kVec], bias[kVec];
  if (inside) {
    load_param<Y>(p.weight, col, 1.f, weight);
    load_param<Y>(p.bias, col, 0.f, bias);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    if (row >= p.rows) break;
    rstd[r] = rsqrtf(rstd[r] / p.cols + p.eps);
    if (threadIdx.x == 0) {
      p.mean[row] = mean[r];
      p.rstd[row] = rstd[r];
    }
    if (!inside || p.y.data == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[r][i] = (x[r][i] - mean[r]) * rstd[r] * weight[i] + bias[i];
    store(row_of<Y>(p.y, row) + col, x[r]);
  }
}

// Any width and alignment: one row a block, read three times (from the cache after the first).
template <typename X, typename Y>
__global__ void __launch_bounds__(kAnyThreads) layernorm_fwd_any_kernel(LayerNormFwd p) {
  __shared__ float sums[2][kAnyThreads / kWarp];
  const int64_t row = blockIdx.x;
  const X* x = row_of<const X>(p.x, row);
  float mean[1] = {0.f}, rstd[1] = {0.f};
  for (int col = threadIdx.x; col < p.cols; col += kAnyThreads) mean[0] += to_float(x[col]);
  block_sum(mean, sums[0]);
  mean[0] /= p.cols;
  for (int col = threadIdx.x; col < p.cols; col += kAnyThreads) {
    const float centred = to_float(x[col]) - mean[0];
    rstd[0] += centred * centred;
  }
  block_sum(rstd, sums[1]);
  rstd[0] = rsqrtf(rstd[0] / p.cols + p.eps);
  if (threadIdx.x == 0) {
    p.mean[row] = mean[0];
    p.rstd[row] = rstd[0];
  }
  if (p.y.data == nullptr) return;
  for (int col = threadIdx.x; col < p.cols; col += kAnyThreads) {
    const float weight = param<Y>(p.weight, col, 1.f), bias = param<Y>(p.bias, col, 0.f);
    row_of<Y>(p.y, row)[col] = from_float<Y>((to_float(x[col]) - mean[0]) * rstd[0] * weight + bias);
  }
}

cudaError_t launch_layernorm_fwd(const LayerNormFwd& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool vectors = p.cols % kVec == 0 && p.cols <= kMaxThreads * kVec && aligned(p.x) && aligned(p.y) &&
                       aligned(p.weight) && aligned(p.bias);
  return with_types(p.x.dtype, p.y.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (vectors) {
      const int threads = int(ceil_div(p.cols / kVec, kWarp)) * kWarp;
      layernorm_fwd_kernel<X, Y><<<ceil_div(p.rows, kRows), threads, 0, stream>>>(p);
    } else {
      layernorm_fwd_any_kernel<X, Y><<<p.rows, kAnyThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace fastvit
