// LayerNorm backward, one pass over memory: dx with the residual's gradient added, the forward's y once more, and
// each block's sums for dweight and dbias, which launch_sum_partials finishes.
#include "cuda/common.cuh"

namespace fastvit {

constexpr int kMaxThreads = 512;  // so rows up to 4096 columns are held by one block
constexpr int kRows = 2;          // rows a block has in flight: one barrier serves them all
constexpr int kAnyThreads = 256;
constexpr int kThreadsPerSm = 1024;

// Blocks walk over the rows, so that the column sums stay in registers until the end.
template <typename X, typename Y>
__global__ void __launch_bounds__(kMaxThreads) layernorm_bwd_kernel(LayerNormBwd p) {
  __shared__ float sums[2][2 * kRows * kMaxThreads / kWarp];
  const int col = threadIdx.x * kVec;
  const bool inside = col < p.cols;
  const float per_col = 1.f / p.cols;

  float weight[kVec], dweight[kVec] = {}, dbias[kVec] = {};
  load_param<Y>(inside ? p.weight : Vector{}, col, 1.f, weight);
  int turn = 0;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < p.rows; first += int64_t(gridDim.x) * kRows, turn ^= 1) {
    Packed<X, kVec> x_in[kRows], residual_in[kRows];
    Packed<Y, kVec> dy_in[kRows];
    float mean[kRows], rstd[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      if (!inside || row >= p.rows) continue;
      x_in[r] = load_packed<kVec>(row_of<const X>(p.x, row) + col);
      dy_in[r] = load_packed<kVec>(row_of<const Y>(p.dy, row) + col);
      if (p.dresidual.data != nullptr) residual_in[r] = load_packed<kVec>(row_of<const X>(p.dresidual, row) + col);
      mean[r] = p.mean[row];
      rstd[r] = p.rstd[row];
    }
    float total[2 * kRows] = {};  // a row's sums of g and of g * xhat, g = dy * weight
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!inside || first + r >= p.rows) continue;
      float x[kVec], dy[kVec];
      unpack(x_in[r], x);
      unpack(dy_in[r], dy);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float xhat = (x[i] - mean[r]) * rstd[r], g = dy[i] * weight[i];
        dweight[i] += dy[i] * xhat;
        dbias[i] += dy[i];
        total[2 * r] += g;
        total[2 * r + 1] += g * xhat;
      }
    }
    block_sum(total, sums[turn]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      if (!inside || row >= p.rows) continue;
      float xhat[kVec], dy[kVec], out[kVec] = {};
      unpack(x_in[r], xhat);
      unpack(dy_in[r], dy);
      if (p.dresidual.data != nullptr) unpack(residual_in[r], out);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        xhat[i] = (xhat[i] - mean[r]) * rstd[r];
        out[i] += rstd[r] * (dy[i] * weight[i] - total[2 * r] * per_col - xhat[i] * (total[2 * r + 1] * per_col));
      }
      store(row_of<X>(p.dx, row) + col, out);
      if (p.y.data == nullptr) continue;
      load_param<Y>(p.bias, col, 0.f, out);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] += xhat[i] * weight[i];
      store(row_of<Y>(p.y, row) + col, out);
    }
  }
  if (!inside || p.partials == nullptr) return;
  float* partials = p.partials + int64_t(blockIdx.x) * 2 * p.cols + col;
  store(partials, dweight);
  store(partials + p.cols, dbias);
}

// Any width and alignment: a row at a time, the column sums in the block's own part of `partials`.
template <typename X, typename Y>
__global__ void __launch_bounds__(kAnyThreads, 4) layernorm_bwd_any_kernel(LayerNormBwd p) {
  __shared__ float sums[2][2 * kAnyThreads / kWarp];
  float* dweight = p.partials == nullptr ? nullptr : p.partials + int64_t(blockIdx.x) * 2 * p.cols;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    const X* x = row_of<const X>(p.x, row);
    const Y* dy = row_of<const Y>(p.dy, row);
    const float mean = p.mean[row], rstd = p.rstd[row];
    const bool is_first = row == blockIdx.x;
    float total[2] = {};
    for (int col = threadIdx.x; col < p.cols; col += kAnyThreads) {
      const float xhat = (to_float(x[col]) - mean) * rstd, grad = to_float(dy[col]);
      const float g = grad * param<Y>(p.weight, col, 1.f);
      total[0] += g;
      total[1] += g * xhat;
      if (dweight == nullptr) continue;
      dweight[col] = (is_first ? 0.f : dweight[col]) + grad * xhat;
      dweight[p.cols + col] = (is_first ? 0.f : dweight[p.cols + col]) + grad;
    }
    block_sum(total, sums[turn]);
    for (int col = threadIdx.x; col < p.cols; col += kAnyThreads) {
      const float xhat = (to_float(x[col]) - mean) * rstd, weight = param<Y>(p.weight, col, 1.f);
      const float dx = rstd * (to_float(dy[col]) * weight - total[0] / p.cols - xhat * (total[1] / p.cols));
      const float residual = p.dresidual.data == nullptr ? 0.f : to_float(row_of<const X>(p.dresidual, row)[col]);
      row_of<X>(p.dx, row)[col] = from_float<X>(residual + dx);
      if (p.y.data == nullptr) continue;
      row_of<Y>(p.y, row)[col] = from_float<Y>(xhat * weight + param<Y>(p.bias, col, 0.f));
    }
  }
}

static int row_threads(int cols) { return int(ceil_div(ceil_div(cols, kVec), kWarp)) * kWarp; }

int layernorm_bwd_groups(int64_t rows, int cols) {
  const int64_t per_sm = ceil_div(kThreadsPerSm, row_threads(cols));
  return int(std::min<int64_t>(ceil_div(rows, kRows), multiprocessors() * per_sm));
}

cudaError_t launch_layernorm_bwd(const LayerNormBwd& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool vectors = p.cols % kVec == 0 && p.cols <= kMaxThreads * kVec && aligned(p.x) && aligned(p.dy) &&
                       aligned(p.dresidual) && aligned(p.dx) && aligned(p.y) && aligned(p.weight) && aligned(p.bias);
  return with_types(p.x.dtype, p.dy.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (vectors) {
      layernorm_bwd_kernel<X, Y><<<p.groups, row_threads(p.cols), 0, stream>>>(p);
    } else {
      layernorm_bwd_any_kernel<X, Y><<<p.groups, kAnyThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace fastvit
