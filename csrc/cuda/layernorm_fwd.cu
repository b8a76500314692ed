// LayerNorm forward, one pass over memory: a warp keeps its row in registers, eight columns a lane at a time.
#include "cuda/shared_row.cuh"

namespace fastvit {

constexpr int kRows = 4;  // warps of a block, one row each
constexpr int kMaxVecs = 16;
constexpr int kMaxAhead = 6 * 256 * sizeof(float);  // bytes of a row beside which the next one has room in 48 KB
constexpr int kAnyThreads = 256;

// A kernel for rows of up to `vecs` vectors a lane: `sure` of them lie inside any row it is taken for, and as many
// blocks run on a multiprocessor as leave a thread the registers it needs.
struct FwdShape {
  int vecs, sure, blocks;
};
constexpr FwdShape kFwdShapes[] = {{2, 0, 8}, {3, 2, 7}, {4, 3, 5}, {6, 4, 4}, {8, 6, 3}, {kMaxVecs, 8, 2}};

constexpr FwdShape shape_of(int vecs) {
  const FwdShape* shape = kFwdShapes;
  while (shape->vecs < vecs) ++shape;
  return *shape;
}

template <int VECS>
constexpr FwdShape kFwdShape = shape_of(VECS);

// Rows of up to VECS * 256 columns. Warps walk over the rows; the next one comes while one is at work.
template <typename X, typename Y, int VECS>
__global__ void __launch_bounds__(kRows* kWarp, kFwdShape<VECS>.blocks) layernorm_fwd_kernel(LayerNormFwd p) {
  constexpr bool kAhead = VECS * kWarp * kVec * sizeof(X) <= kMaxAhead;
  __shared__ SharedRow<X, kAhead ? VECS : 1, kRows * kWarp> next;
  __shared__ SharedParam<VECS> weight, bias;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t(gridDim.x) * kRows;
  int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  constexpr int kSure = kFwdShape<VECS>.sure;
  const auto is_inside = [&](int v, int col) { return v < kSure || col < p.cols; };
  const auto fetch = [&](int64_t from) {
    if (!kAhead || from >= p.rows) return;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int col = (v * kWarp + lane) * kVec;
      if (is_inside(v, col)) next.fetch(v, threadIdx.x, row_of<const X>(p.x, from) + col);
    }
    end_group_of_copies();
  };

  await_previous();
  allow_next();
  fetch(row);
  weight.template load<Y>(p.weight, p.cols, 1.f);
  bias.template load<Y>(p.bias, p.cols, 0.f);
  __syncthreads();
  for (; row < p.rows; row += step) {
    float x[VECS][kVec] = {};
    wait_for_copies_before<0>();
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int col = (v * kWarp + lane) * kVec;
      if (!is_inside(v, col)) continue;
      if constexpr (kAhead) {
        unpack(next.take(v, threadIdx.x), x[v]);
      } else {
        load(row_of<const X>(p.x, row) + col, x[v]);
      }
    }
    fetch(row + step);
    float mean = 0.f, rstd = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) mean += x[v][i];
    }
    mean = warp_sum(mean) / p.cols;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (!is_inside(v, (v * kWarp + lane) * kVec)) continue;
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
      if (!is_inside(v, col)) continue;
      float w[kVec], b[kVec];
      weight.read(v, w);
      bias.read(v, b);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[v][i] = (x[v][i] - mean) * rstd * w[i] + b[i];
      store(row_of<Y>(p.y, row) + col, x[v]);
    }
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
      return with_vecs(p.cols, [&](auto vecs) {
        constexpr auto* kernel = layernorm_fwd_kernel<X, Y, vecs()>;
        const int64_t blocks = blocks_at_once<kernel>(kRows * kWarp);
        const dim3 grid(unsigned(std::min(ceil_div(p.rows, kRows), blocks)));
        return launch_overlapping<kernel>(grid, kRows * kWarp, p, stream);
      });
    }
    layernorm_fwd_any_kernel<X, Y><<<p.rows, kAnyThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace fastvit
