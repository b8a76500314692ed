// LayerScale, DropPath's row scale and the residual: forward, and the gradient's way back through them.
#include "cuda/pass.cuh"

namespace fastvit {

int pass_groups(int64_t rows, int64_t cols) {
  const int64_t column_blocks = std::max<int64_t>(ceil_div(cols, kVec * kWarp), 1);
  const int64_t wanted = ceil_div(int64_t(multiprocessors()) * kBlocksPerSm, column_blocks);
  return int(std::min<int64_t>({ceil_div(rows, kPassRows * 2), wanted, 65535}));
}

// Fewer than 2^31 rows, so a 32-bit division finds the sample.
template <typename T>
__device__ inline float sample_scale(const Vector& scale, int64_t row, unsigned rows_per_sample) {
  return scale.data == nullptr ? 1.f : param<T>(scale, unsigned(row) / rows_per_sample, 1.f);
}

template <int N>
struct Columns {
  float v[N];
};

template <typename Out, typename Branch, int N>
struct ScaleResidualOp {
  static constexpr bool kMaySum = false;
  struct Loaded {
    Packed<Branch, N> branch;
    Packed<Out, N> residual;
    float scale;
  };
  Matrix branch, residual, out;
  Vector layer_scale, row_scale;
  unsigned rows_per_sample;

  __device__ Columns<N> columns(int64_t col) const {
    Columns<N> scale;
    load_param<Branch>(layer_scale, col, 1.f, scale.v);
    return scale;
  }
  __device__ Loaded load(int64_t row, int64_t col) const {
    Loaded in;
    in.branch = load_packed<N>(row_of<const Branch>(branch, row) + col);
    if (residual.data != nullptr) in.residual = load_packed<N>(row_of<const Out>(residual, row) + col);
    in.scale = sample_scale<Branch>(row_scale, row, rows_per_sample);
    return in;
  }
  __device__ void run(int64_t row, int64_t col, const Loaded& in, const Columns<N>& scale, float (&)[N]) const {
    float value[N], sum[N] = {};
    unpack(in.branch, value);
    if (residual.data != nullptr) unpack(in.residual, sum);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += in.scale * scale.v[i] * value[i];
    store(row_of<Out>(out, row) + col, sum);
  }
};

template <typename X, typename Y, int N>
struct ScaleOp {
  static constexpr bool kMaySum = true;
  struct Loaded {
    Packed<X, N> x;
    float scale;
  };
  Matrix x, y;
  Vector row_scale, column_scale;
  unsigned rows_per_sample;

  __device__ Columns<N> columns(int64_t col) const {
    Columns<N> scale;
    load_param<Y>(column_scale, col, 1.f, scale.v);
    return scale;
  }
  __device__ Loaded load(int64_t row, int64_t col) const {
    return {load_packed<N>(row_of<const X>(x, row) + col), sample_scale<Y>(row_scale, row, rows_per_sample)};
  }
  __device__ void run(int64_t row, int64_t col, const Loaded& in, const Columns<N>& scale, float (&sums)[N]) const {
    float v[N];
    unpack(in.x, v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] *= in.scale;
      sums[i] += v[i];
      v[i] *= scale.v[i];
    }
    if (y.data != nullptr) store(row_of<Y>(y, row) + col, v);
  }
};

static unsigned rows_per_sample(int64_t rows, int64_t samples) {
  return samples == 0 || rows < samples ? 1u : unsigned(rows / samples);
}

cudaError_t launch_scale_residual_fwd(const ScaleResidualFwd& p, cudaStream_t stream) {
  const unsigned rows = rows_per_sample(p.pass.rows, p.samples);
  const bool vectors =
      p.pass.cols % kVec == 0 && aligned(p.branch) && aligned(p.residual) && aligned(p.out) && aligned(p.layer_scale);
  return with_types(p.out.dtype, p.branch.dtype, [&](auto out, auto branch) {
    using Out = typename decltype(out)::type;
    using Branch = typename decltype(branch)::type;
    if (vectors) {
      const ScaleResidualOp<Out, Branch, kVec> op{p.branch, p.residual, p.out, p.layer_scale, p.row_scale, rows};
      return launch_pass<kVec>(op, p.pass, stream);
    }
    const ScaleResidualOp<Out, Branch, 1> op{p.branch, p.residual, p.out, p.layer_scale, p.row_scale, rows};
    return launch_pass<1>(op, p.pass, stream);
  });
}

cudaError_t launch_scale(const Scale& p, cudaStream_t stream) {
  const unsigned rows = rows_per_sample(p.pass.rows, p.samples);
  const bool vectors = p.pass.cols % kVec == 0 && aligned(p.x) && aligned(p.y) && aligned(p.column_scale);
  return with_types(p.x.dtype, p.y.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (vectors) {
      return launch_pass<kVec>(ScaleOp<X, Y, kVec>{p.x, p.y, p.row_scale, p.column_scale, rows}, p.pass, stream);
    }
    return launch_pass<1>(ScaleOp<X, Y, 1>{p.x, p.y, p.row_scale, p.column_scale, rows}, p.pass, stream);
  });
}

}  // namespace fastvit
