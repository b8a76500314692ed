// LayerNorm forward, one pass over memory: a warp keeps its row in registers, eight columns a lane at a time.
#include "cuda/common.cuh"

namespace fastvit {

constexpr int kRows = 4;  // warps of a block, one row each
constexpr int kMaxVecs = 16;
constexpr int kAnyThreads = 256;

// Rows of up to VECS * 256 columns. Without the least number of blocks said, nvcc spills for more of them.
template <typename X, typename Y, int VECS>
__global__ void __launch_bounds__(kRows* kWarp, 1) layernorm_fwd_kernel(LayerNormFwd p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  await_previous();
  allow_next();
  if (row >= p.rows) return;

  float x[VECS][kVec] = {};
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    const int col = (v * kWarp + lane) * kVec;
    if (col < p.cols) load(row_of<const X>(p.x, row) + col, x[v]);
  }
  float mean = 0.f, rstd = 0.f;
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) mean += x[v][i];
  }
  mean = warp_sum(mean) / p.cols;
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    if ((v * kWarp + lane) * kVec >= p.cols) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) rstd += (x[v][i] - mean) * (x[v][i] - mean);
  }
  rstd = rsqrtf(warp_sum(rstd) / p.cols + p.eps);
  if (lane == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    const int col = (v * kWarp + lane) * kVec;
    if (col >= p.cols) continue;
    float weight[kVec], bias[kVec];
    load_param<Y>(p.weight, col, 1.f, weight);
    load_param<Y>(p.bias, col, 0.f, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[v][i] = (x[v][i] - mean) * rstd * weight[i] + bias[i];
    store(row_of<Y>(p.y, row) + col, x[v]);
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
  for (int col = threadIdx.x; col < p.cols; col += kAnyThreads) {
    const float weight = param<Y>(p.weight, col, 1.f), bias = param<Y>(p.bias, col, 0.f);
    row_of<Y>(p.y, row)[col] = from_float<Y>((to_float(x[col]) - mean[0]) * rstd[0] * weight + bias);
  }
}

// f(std::integral_constant<int, VECS>) for the narrowest kernel that holds a row.
template <typename F>
cudaError_t with_vecs(int cols, F&& f) {
  const int vecs = int(ceil_div(cols, kWarp * kVec));
  if (vecs <= 2) return f(std::integral_constant<int, 2>{});
  if (vecs <= 3) return f(std::integral_constant<int, 3>{});
  if (vecs <= 4) return f(std::integral_constant<int, 4>{});
  if (vecs <= 6) return f(std::integral_constant<int, 6>{});
  if (vecs <= 8) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, kMaxVecs>{});
}

cudaError_t launch_layernorm_fwd(const LayerNormFwd& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool vectors = p.cols % kVec == 0 && p.cols <= kMaxVecs * kWarp * kVec && aligned(p.x) && aligned(p.y) &&
                       aligned(p.weight) && aligned(p.bias);
  return with_types(p.x.dtype, p.y.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (vectors) {
      const dim3 grid(unsigned(ceil_div(p.rows, kRows)));
      return with_vecs(p.cols, [&](auto vecs) {
        return launch_overlapping<layernorm_fwd_kernel<X, Y, vecs()>>(grid, kRows * kWarp, p, stream);
      });
    }
    layernorm_fwd_any_kernel<X, Y><<<p.rows, kAnyThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace fastvit
