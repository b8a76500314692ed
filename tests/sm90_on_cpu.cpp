// What the products of csrc/cuda/sm90 compute, as plain loops: for cuda_on_cpu.py, which builds the real glue on them.
// Sums, epilogues, rounding and partial sums as on the GPU; the activations are the kernels' own source.
#include "cuda/activation.h"
#include "cuda/common.cuh"
#include "cuda/sm90/attention.h"
#include "cuda/sm90/gemm.h"

namespace fastvit::sm90 {

template <DType DTYPE>
using ElementOf = std::conditional_t<DTYPE == DType::kFloat32, float,
                                     std::conditional_t<DTYPE == DType::kBFloat16, __nv_bfloat16, __half>>;

template <typename T>
std::vector<float> wide(const Matrix& m, int64_t rows, int64_t cols) {
  std::vector<float> out(rows * cols);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[r * cols + c] = to_float(row_of<T>(m, r)[c]);
  }
  return out;
}

Gate gate_of(Activation act, float h) {
  switch (act) {
    case Activation::kGelu:
      return gate<Activation::kGelu, true>(h);
    case Activation::kGeluTanh:
      return gate<Activation::kGeluTanh, true>(h);
    case Activation::kQuickGelu:
      return gate<Activation::kQuickGelu, true>(h);
    default:
      return {1.f, 0.f};
  }
}

float dot(const float* a, const float* b, int64_t depth) {
  float sum = 0.f;
  for (int64_t k = 0; k < depth; ++k) sum += a[k] * b[k];
  return sum;
}

template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_act(const LinearAct& p, cudaStream_t) {
  using T = ElementOf<DTYPE>;
  const auto x = wide<T>(p.x, p.rows, p.depth), weight = wide<T>(p.weight, p.cols, p.depth);
  for (int64_t m = 0; m < p.rows; ++m) {
    for (int64_t n = 0; n < p.cols; ++n) {
      const float sum = dot(&x[m * p.depth], &weight[n * p.depth], p.depth);
      const float h = sum + param<T>(p.bias, n, 0.f);
      const float y = p.act == Activation::kGelu ? activate<Activation::kGelu, true>(h) : h * gate_of(p.act, h).value;
      if (p.h.data != nullptr) row_of<T>(p.h, m)[n] = from_float<T>(h);
      row_of<T>(p.y, m)[n] = from_float<T>(y);
    }
  }
  return cudaGetLastError();
}

template <DType DTYPE, Tile TILE, DType STREAM>
cudaError_t launch_linear_residual(const LinearResidual& p, cudaStream_t) {
  using T = ElementOf<DTYPE>;
  using Out = ElementOf<STREAM>;
  const auto x = wide<T>(p.x, p.rows, p.depth), weight = wide<T>(p.weight, p.cols, p.depth);
  for (int64_t m = 0; m < p.rows; ++m) {
    const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[m];
    for (int64_t n = 0; n < p.cols; ++n) {
      const float sum = dot(&x[m * p.depth], &weight[n * p.depth], p.depth) + param<T>(p.bias, n, 0.f);
      const float scale = row_scale * param<T>(p.layer_scale, n, 1.f);
      row_of<Out>(p.y, m)[n] = from_float<Out>(std::fma(scale, sum, to_float(row_of<Out>(p.residual, m)[n])));
    }
  }
  return cudaGetLastError();
}

template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_act_grad(const LinearActGrad& p, cudaStream_t) {
  using T = ElementOf<DTYPE>;
  constexpr TileSize kSize = kLinearActGradTiles[int(TILE)];
  const int64_t tile_rows = kSize.rows, tile_cols = kSize.cols;
  const int64_t stride = (p.cols + tile_cols - 1) / tile_cols * tile_cols;
  const auto dy = wide<T>(p.dy, p.rows, p.depth), weight = wide<T>(p.weight, p.depth, p.cols);
  constexpr int kLanes = 8;  // a warp's rows lie in as many lanes, each of which adds up its own
  std::vector<float> lanes(kLanes * stride);
  for (int64_t m = 0; m < p.rows; ++m) {
    float* partials = p.partials == nullptr ? nullptr : p.partials + m / tile_rows * stride;
    if (m % tile_rows == 0) std::fill(lanes.begin(), lanes.end(), 0.f);
    for (int64_t n = 0; n < p.cols; ++n) {
      float da = 0.f;
      for (int64_t k = 0; k < p.depth; ++k) da += dy[m * p.depth + k] * weight[k * p.cols + n];
      const float h = to_float(row_of<T>(p.h, m)[n]);
      const Gate g = gate_of(p.act, h);
      const float dh = da * std::fma(h, g.slope, g.value);
      row_of<T>(p.dh, m)[n] = from_float<T>(dh);
      if (p.a.data != nullptr) row_of<T>(p.a, m)[n] = from_float<T>(h * g.value);
      lanes[m % kLanes * stride + n] += dh;
    }
    if (partials == nullptr || (m + 1 < p.rows && (m + 1) % tile_rows != 0)) continue;
    std::fill(partials, partials + stride, 0.f);
    for (size_t i = 0; i < lanes.size(); ++i) partials[i % stride] += lanes[i];
  }
  return cudaGetLastError();
}

template <typename T>
const T* token_of(const HeadRows& t, int64_t sample, int64_t head, int64_t token) {
  return static_cast<const T*>(t.data) + sample * t.sample + head * t.head + token * t.token;
}

// hopper_on_cpu.h has a model of the kernel itself; the result is all that is wanted here.
template <DType DTYPE>
cudaError_t launch_attention_fwd(const AttentionFwd& p, cudaStream_t) {
  using T = ElementOf<DTYPE>;
  std::vector<float> weights(p.keys);
  for (int64_t i = 0; i < p.batch * p.heads * p.queries; ++i) {
    const int64_t sample = i / p.queries / p.heads, head = i / p.queries % p.heads, query = i % p.queries;
    const T* q = token_of<T>(p.q, sample, head, query);
    float most = -INFINITY, sum = 0.f;
    for (int64_t j = 0; j < p.keys; ++j) {
      const T* k = token_of<T>(p.k, sample, head, j);
      float score = 0.f;
      for (int64_t d = 0; d < p.dim; ++d) score += to_float(q[d]) * to_float(k[d]);
      most = std::max(most, weights[j] = score * p.scale);
    }
    for (float& weight : weights) sum += weight = std::exp(weight - most);
    p.lse[i] = most + std::log(sum);
    T* out = static_cast<T*>(p.out) + ((sample * p.queries + query) * p.heads + head) * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      float value = 0.f;
      for (int64_t j = 0; j < p.keys; ++j) value += weights[j] * to_float(token_of<T>(p.v, sample, head, j)[d]);
      out[d] = from_float<T>(value / sum);
    }
  }
  return cudaGetLastError();
}

template <typename T>
float dot(const T* a, const T* b, int64_t dim) {
  float sum = 0.f;
  for (int64_t d = 0; d < dim; ++d) sum += to_float(a[d]) * to_float(b[d]);
  return sum;
}

// row += factor * x
template <typename T>
void add_to(float* row, float factor, const T* x, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) row[d] += factor * to_float(x[d]);
}

template <typename T>
void store_rows(const HeadRows& to, int64_t sample, int64_t head, const std::vector<float>& rows, int64_t dim) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const_cast<T*>(token_of<T>(to, sample, head, i / dim))[i % dim] = from_float<T>(rows[i]);
  }
}

template <DType DTYPE>
cudaError_t launch_attention_bwd(const AttentionBwd& p, cudaStream_t) {
  using T = ElementOf<DTYPE>;
  for (int64_t i = 0; i < p.batch * p.heads; ++i) {
    const int64_t b = i / p.heads, h = i % p.heads;
    std::vector<float> dq(p.queries * p.dim), dk(p.keys * p.dim), dv(p.keys * p.dim);
    for (int64_t n = 0; n < p.queries; ++n) {
      const T *q = token_of<T>(p.q, b, h, n), *dout = token_of<T>(p.dout, b, h, n);
      const float delta = dot(dout, token_of<T>(p.out, b, h, n), p.dim);
      for (int64_t m = 0; m < p.keys; ++m) {
        const T *k = token_of<T>(p.k, b, h, m), *v = token_of<T>(p.v, b, h, m);
        const float weight = std::exp(dot(q, k, p.dim) * p.scale - p.lse[i * p.queries + n]);
        const float score = weight * (dot(dout, v, p.dim) - delta) * p.scale;
        add_to(&dq[n * p.dim], score, k, p.dim);
        add_to(&dk[m * p.dim], score, q, p.dim);
        add_to(&dv[m * p.dim], weight, dout, p.dim);
      }
    }
    store_rows<T>(p.dq, b, h, dq, p.dim);
    store_rows<T>(p.dk, b, h, dk, p.dim);
    store_rows<T>(p.dv, b, h, dv, p.dim);
  }
  return cudaGetLastError();
}

#define FASTVIT_TILE(DTYPE, TILE)                                                                       \
  template cudaError_t launch_linear_act<DTYPE, TILE>(const LinearAct&, cudaStream_t);                  \
  template cudaError_t launch_linear_act_grad<DTYPE, TILE>(const LinearActGrad&, cudaStream_t);         \
  template cudaError_t launch_linear_residual<DTYPE, TILE, DTYPE>(const LinearResidual&, cudaStream_t); \
  template cudaError_t launch_linear_residual<DTYPE, TILE, DType::kFloat32>(const LinearResidual&, cudaStream_t);
FASTVIT_TILE(DType::kBFloat16, Tile::kLarge)
FASTVIT_TILE(DType::kBFloat16, Tile::kSmall)
FASTVIT_TILE(DType::kFloat16, Tile::kLarge)
FASTVIT_TILE(DType::kFloat16, Tile::kSmall)
template cudaError_t launch_attention_fwd<DType::kBFloat16>(const AttentionFwd&, cudaStream_t);
template cudaError_t launch_attention_fwd<DType::kFloat16>(const AttentionFwd&, cudaStream_t);
template cudaError_t launch_attention_bwd<DType::kBFloat16>(const AttentionBwd&, cudaStream_t);
template cudaError_t launch_attention_bwd<DType::kFloat16>(const AttentionBwd&, cudaStream_t);

}  // namespace fastvit::sm90
