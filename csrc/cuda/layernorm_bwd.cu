// LayerNorm backward, one pass over memory: dx with the residual's gradient added, the forward's y once more, and
// each block's sums for dweight and dbias, which launch_sum_partials finishes.
#include "cuda/shared_row.cuh"

namespace fastvit {

constexpr int kMaxWarpVecs = 4;  // a warp holds rows of up to 1024 columns, a block those that are wider
constexpr int kWideVecs = 2;
constexpr int kMaxWide = 224;  // threads: rows of up to 3584 columns have room in 48 KB
constexpr int kAnyThreads = 256;
constexpr int kAnyPerSm = 4;

template <typename X, typename Y, int VECS, bool WIDE>
struct BwdShape {
  static constexpr int kRows = WIDE ? 1 : VECS == 4 && sizeof(X) == 4 ? 2 : 4;  // of a block at a time
  static constexpr int kThreads = WIDE ? kMaxWide : kRows * kWarp;
  // Blocks a multiprocessor: as many as leave a thread the registers it needs.
  static constexpr int kBlocks = WIDE ? 2 : VECS == 1 ? 6 : VECS == 2 || kRows == 2 ? 4 : 3;
};

// A row a warp, or WIDE: a row a block. They walk over the rows, so that the column sums stay in registers to the end.
// x and dy come while the row before is at work, the residual's gradient from the end of that on.
template <typename X, typename Y, int VECS, bool WIDE>
__global__ void __launch_bounds__(BwdShape<X, Y, VECS, WIDE>::kThreads, BwdShape<X, Y, VECS, WIDE>::kBlocks)
    layernorm_bwd_kernel(LayerNormBwd p) {
  constexpr int kThreads = BwdShape<X, Y, VECS, WIDE>::kThreads, kRows = BwdShape<X, Y, VECS, WIDE>::kRows;
  __shared__ SharedRow<X, VECS, kThreads> next_x, next_residual;
  __shared__ SharedRow<Y, VECS, kThreads> next_dy;
  __shared__ SharedParam<WIDE ? 1 : VECS> weight, bias;
  const int lanes = WIDE ? blockDim.x : kWarp, lane = threadIdx.x % lanes, warp = threadIdx.x / kWarp;
  const int64_t step = int64_t(gridDim.x) * kRows;
  int64_t row = WIDE ? blockIdx.x : int64_t(blockIdx.x) * kRows + warp;
  const float per_col = 1.f / p.cols;
  float next_mean = 0.f, next_rstd = 0.f;

  // f(v, column) for the lane's vectors; all but the last lie inside
  const auto each_vector = [&](auto&& f) {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int col = (v * lanes + lane) * kVec;
      if (v < VECS - 1 || col < p.cols) f(v, col);
    }
  };
  const auto fetch = [&](int64_t from) {
    if (from < p.rows) {
      each_vector([&](int v, int col) {
        next_x.fetch(v, threadIdx.x, row_of<const X>(p.x, from) + col);
        next_dy.fetch(v, threadIdx.x, row_of<const Y>(p.dy, from) + col);
      });
      next_mean = p.mean[from];
      next_rstd = p.rstd[from];
    }
    end_group_of_copies();
  };
  const auto fetch_residual = [&](int64_t from) {
    if (from < p.rows && p.dresidual.data != nullptr) {
      each_vector(
          [&](int v, int col) { next_residual.fetch(v, threadIdx.x, row_of<const X>(p.dresidual, from) + col); });
    }
    end_group_of_copies();
  };
  const auto read_param = [&](auto& shared, const Vector& param, float otherwise, int v, int col, float (&out)[kVec]) {
    if constexpr (WIDE) {
      load_param<Y>(param, col, otherwise, out);
    } else {
      shared.read(v, out);
    }
  };

  float dweight[VECS][kVec] = {}, dbias[VECS][kVec] = {};
  fetch(row);
  fetch_residual(row);
  if constexpr (!WIDE) {
    weight.template load<Y>(p.weight, p.cols, 1.f);
    bias.template load<Y>(p.bias, p.cols, 0.f);
    __syncthreads();
  }
  for (int turn = 0; row < p.rows; row += step, turn ^= 1) {
    Packed<X, kVec> x_in[VECS];
    Packed<Y, kVec> dy_in[VECS];
    const float mean = next_mean, rstd = next_rstd;
    wait_for_copies_before<1>();
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      x_in[v] = next_x.take(v, threadIdx.x);
      dy_in[v] = next_dy.take(v, threadIdx.x);
    }
    fetch(row + step);

    float total[2] = {};  // the row's sums of g and of g * xhat, g = dy * weight
    each_vector([&](int v, int col) {
      float x[kVec], dy[kVec], w[kVec];
      unpack(x_in[v], x);
      unpack(dy_in[v], dy);
      read_param(weight, p.weight, 1.f, v, col, w);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float xhat = (x[i] - mean) * rstd, g = dy[i] * w[i];
        dweight[v][i] += dy[i] * xhat;
        dbias[v][i] += dy[i];
        total[0] += g;
        total[1] += g * xhat;
      }
    });
    if constexpr (WIDE) {
      __shared__ float sums[2][2 * kMaxWide / kWarp];
      block_sum(total, sums[turn]);
    } else {
      total[0] = warp_sum(total[0]);
      total[1] = warp_sum(total[1]);
    }
    wait_for_copies_before<1>();
    const float of_g = total[0] * per_col, of_xhat = total[1] * per_col;
    each_vector([&](int v, int col) {
      float xhat[kVec], dy[kVec], w[kVec], out[kVec] = {};
      unpack(x_in[v], xhat);
      unpack(dy_in[v], dy);
      read_param(weight, p.weight, 1.f, v, col, w);
      if (p.dresidual.data != nullptr) unpack(next_residual.take(v, threadIdx.x), out);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        xhat[i] = (xhat[i] - mean) * rstd;
        out[i] += rstd * (dy[i] * w[i] - of_g - xhat[i] * of_xhat);
      }
      store(row_of<X>(p.dx, row) + col, out);
      if (p.y.data == nullptr) return;
      read_param(bias, p.bias, 0.f, v, col, out);
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] += xhat[i] * w[i];
      store(row_of<Y>(p.y, row) + col, out);
    });
    fetch_residual(row + step);
  }

  if (p.partials == nullptr) return;
  float* partials = p.partials + int64_t(blockIdx.x) * 2 * p.cols;
  float* before = reinterpret_cast<float*>(&next_x);  // sums of the warps before this one
  for (int turn = 0; turn < kRows; ++turn) {
    if (kRows > 1) __syncthreads();
    if (!WIDE && warp != turn) continue;
    float* to = turn == kRows - 1 ? partials : before;
    each_vector([&](int v, int col) {
      if (turn > 0) add(before + col, dweight[v]), add(before + p.cols + col, dbias[v]);
      store(to + col, dweight[v]);
      store(to + p.cols + col, dbias[v]);
    });
  }
}

// Any width and alignment: a row at a time, the column sums in the block's own part of `partials`.
template <typename X, typename Y>
__global__ void __launch_bounds__(kAnyThreads, kAnyPerSm) layernorm_bwd_any_kernel(LayerNormBwd p) {
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

// f(VECS, WIDE) for the narrowest kernel that holds a row of vectors.
template <typename F>
auto with_shape(int cols, F&& f) {
  switch (ceil_div(cols, kWarp * kVec)) {
    case 1:
      return f(std::integral_constant<int, 1>{}, std::false_type{});
    case 2:
      return f(std::integral_constant<int, 2>{}, std::false_type{});
    case 3:
      return f(std::integral_constant<int, 3>{}, std::false_type{});
    case kMaxWarpVecs:
      return f(std::integral_constant<int, kMaxWarpVecs>{}, std::false_type{});
    default:
      return f(std::integral_constant<int, kWideVecs>{}, std::true_type{});
  }
}

static bool has_vectors(const LayerNormBwd& p) {
  return p.cols % kVec == 0 && p.cols <= kMaxWide * kWideVecs * kVec && aligned(p.x) && aligned(p.dy) &&
         aligned(p.dresidual) && aligned(p.dx) && aligned(p.y) && aligned(p.weight) && aligned(p.bias);
}

static int wide_threads(int cols) { return int(ceil_div(cols, kWideVecs * kWarp * kVec)) * kWarp; }

int layernorm_bwd_groups(const LayerNormBwd& p) {
  int64_t rows = 1, blocks = int64_t(multiprocessors()) * kAnyPerSm;
  if (has_vectors(p)) {
    with_types(p.x.dtype, p.dy.dtype, [&](auto x, auto y) {
      using X = typename decltype(x)::type;
      using Y = typename decltype(y)::type;
      return with_shape(p.cols, [&](auto vecs, auto wide) {
        constexpr auto* kernel = layernorm_bwd_kernel<X, Y, vecs(), wide()>;
        using Shape = BwdShape<X, Y, vecs(), wide()>;
        rows = Shape::kRows;
        blocks = wide() ? blocks_at_once(reinterpret_cast<const void*>(kernel), wide_threads(p.cols))
                        : blocks_at_once<kernel>(Shape::kThreads);
        return cudaSuccess;
      });
    });
  }
  return int(std::min(ceil_div(p.rows, rows), blocks));
}

cudaError_t launch_layernorm_bwd(const LayerNormBwd& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return with_types(p.x.dtype, p.dy.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (!has_vectors(p)) {
      layernorm_bwd_any_kernel<X, Y><<<p.groups, kAnyThreads, 0, stream>>>(p);
      return cudaGetLastError();
    }
    return with_shape(p.cols, [&](auto vecs, auto wide) {
      const int threads = wide() ? wide_threads(p.cols) : BwdShape<X, Y, vecs(), wide()>::kThreads;
      layernorm_bwd_kernel<X, Y, vecs(), wide()><<<p.groups, threads, 0, stream>>>(p);
      return cudaGetLastError();
    });
  });
}

}  // namespace fastvit
