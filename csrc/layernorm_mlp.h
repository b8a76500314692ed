// The bridge between glue (layernorm_mlp.cpp) and kernels (*.cu): plain pointers, strides and a stream, no torch.
//
// Shapes: M rows, E columns of a LayerNorm, C columns of any other pass, B samples of M / B rows each.
// Matrices have unit column stride and `stride` elements from row to row. A null `data` means "not given".
// Every launcher returns the launch's error code. Sums and statistics are float32, and every reduction is done in a
// fixed order, so results are the same from run to run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastvit {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };
enum class Activation : int { kGelu, kGeluTanh, kQuickGelu, kNone };  // kNone: GEMM epilogues only

// Whether the library holds kernels for the current device; cudaErrorNoKernelImageForDevice where it does not.
cudaError_t has_kernels();

struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
};

struct Vector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Whether every row starts at a multiple of 16 bytes.
inline bool aligned(const Matrix& m) {
  const int64_t bytes = m.stride * (m.dtype == DType::kFloat32 ? 4 : 2);
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && bytes % 16 == 0;
}
inline bool aligned(const Vector& v) { return reinterpret_cast<uintptr_t>(v.data) % 16 == 0; }

// y = (x - mean) * rstd * weight + bias
struct LayerNormFwd {
  Matrix x;             // (M, E)
  Vector weight, bias;  // (E,)   float32 or y's dtype, both the same
  Matrix y;             // (M, E)
  float *mean, *rstd;   // (M,)
  int64_t rows;
  int cols;
  float eps;
};
cudaError_t launch_layernorm_fwd(const LayerNormFwd& p, cudaStream_t stream);

// dx = rstd * (g - mean_E(g) - xhat * mean_E(g * xhat)) + dresidual,  g = dy * weight
struct LayerNormBwd {
  Matrix dy;                 // (M, E)
  Matrix x;                  // (M, E)
  const float *mean, *rstd;  // (M,)
  Vector weight, bias;       // (E,)   float32 or dy's dtype
  Matrix dresidual;          // (M, E) optional, x's dtype
  Matrix dx;                 // (M, E) x's dtype
  Matrix y;                  // (M, E) optional, dy's dtype: the forward's y once more, for the weight gradient
  float* partials;           // (G, 2, E) optional: sums over a block's rows of dy * xhat and of dy
  int64_t rows;
  int cols;
  int groups;  // G, from layernorm_bwd_groups
};
int layernorm_bwd_groups(const LayerNormBwd& p);  // the partials need not be there yet
cudaError_t launch_layernorm_bwd(const LayerNormBwd& p, cudaStream_t stream);

// A pass over (M, C) in which a block owns some columns of some rows; `groups` blocks share the rows.
struct Pass {
  int64_t rows, cols;
  int groups;       // G, from pass_groups
  float* partials;  // (G, C) optional: column sums over each block's rows
};
int pass_groups(int64_t rows, int64_t cols);

// a = act(h)
struct ActFwd {
  Matrix h;  // (M, C)
  Matrix a;  // (M, C) may be h itself
  Activation act;
  Pass pass;
};
cudaError_t launch_act_fwd(const ActFwd& p, cudaStream_t stream);

// dh = da * act'(h), written over da; a = act(h) once more; partials of dh
struct ActBwd {
  Matrix da;  // (M, C) in: da, out: dh
  Matrix h;   // (M, C)
  Matrix a;   // (M, C) optional
  Activation act;
  Pass pass;
};
cudaError_t launch_act_bwd(const ActBwd& p, cudaStream_t stream);

// out = residual + row_scale * layer_scale * branch
struct ScaleResidualFwd {
  Matrix branch;       // (M, C)
  Matrix residual;     // (M, C) optional, out's dtype
  Vector layer_scale;  // (C,)   optional, branch's dtype or float32
  Vector row_scale;    // (B,)   optional, branch's dtype or float32
  Matrix out;          // (M, C) branch's dtype or float32
  int64_t samples;     // B
  Pass pass;
};
cudaError_t launch_scale_residual_fwd(const ScaleResidualFwd& p, cudaStream_t stream);

// y = x * row_scale * column_scale; partials of x * row_scale
struct Scale {
  Matrix x;             // (M, C)
  Vector row_scale;     // (B,)   optional, y's dtype or float32
  Vector column_scale;  // (C,)   optional, y's dtype or float32
  Matrix y;             // (M, C) optional, x's dtype, or 16 bits for a float32 x
  int64_t samples;      // B
  Pass pass;
};
cudaError_t launch_scale(const Scale& p, cudaStream_t stream);

// out[k][c] = sum over g of partials[g][k][c], for one or two vectors k
struct SumPartials {
  const float* partials;  // (G, K, C), rows `stride` apart
  Vector out[2];          // (C,) each
  int groups, vectors;    // G, K
  int64_t cols, stride;   // C
};
cudaError_t launch_sum_partials(const SumPartials& p, cudaStream_t stream);

// From g = (dout * row_scale)^T input and sums = column sums of dout * row_scale:
// dweight = layer_scale g,  dbias = layer_scale sums,  dlayer_scale_j = <weight_j, g_j> + bias_j sums_j
struct LayerScaleBwd {
  Matrix g;             // (O, C) float32
  Matrix weight;        // (O, C)
  Vector bias;          // (O,)   optional, weight's dtype
  const float* sums;    // (O,)   optional
  Vector layer_scale;   // (O,)   weight's dtype or float32
  Matrix dweight;       // (O, C) weight's dtype
  Vector dbias;         // (O,)   optional, weight's dtype
  Vector dlayer_scale;  // (O,)   layer_scale's dtype
  int64_t rows, cols;   // O, C
};
cudaError_t launch_layer_scale_bwd(const LayerScaleBwd& p, cudaStream_t stream);

}  // namespace fastvit
