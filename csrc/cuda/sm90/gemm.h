// The bridge between glue (ops.cpp) and Hopper's matrix products (*.cu): plain pointers, strides and a stream.
//
// Every product is x (M, K) times a weight, in one kernel with what follows it. 16-bit operands of one dtype, float32
// sums. The rows of every matrix start at multiples of 16 bytes.
#pragma once

#include "layernorm_mlp.h"

namespace fastvit::sm90 {

// How a product is cut into tiles: "large" or "small" to fastvit/ops/_tiles.py, which chooses. The small ones leave no
// multiprocessor idle when rows are few.
enum class Tile : int { kLarge, kSmall };
struct TileSize {
  int rows, cols, cluster_rows, cluster_cols;  // a cluster's tiles share what they load
};
constexpr TileSize kLinearActTiles[] = {{128, 128, 2, 1}, {64, 96, 1, 1}};
constexpr TileSize kLinearResidualTiles[] = {{128, 128, 2, 1}, {64, 64, 2, 2}};
constexpr TileSize kLinearActGradTiles[] = {{128, 256, 2, 1}, {128, 128, 2, 1}};

// y = act(h), h = x weight^T + bias
struct LinearAct {
  Matrix x;       // (M, K)
  Matrix weight;  // (N, K)
  Vector bias;    // (N,)   optional, x's dtype or float32
  Matrix h;       // (M, N) optional
  Matrix y;       // (M, N)
  Activation act;
  int64_t rows, cols, depth;  // M, N, K
  Tile tile;
  int device;
};
template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_act(const LinearAct& p, cudaStream_t stream);

// y = residual + row_scale * layer_scale * (x weight^T + bias)
struct LinearResidual {
  Matrix x;                // (M, K)
  Matrix weight;           // (N, K)
  Vector bias;             // (N,)   optional, x's dtype or float32
  Vector layer_scale;      // (N,)   optional, x's dtype or float32
  const float* row_scale;  // (M,)   optional
  Matrix residual;         // (M, N) x's dtype or float32: STREAM
  Matrix y;                // (M, N) residual's dtype
  int64_t rows, cols, depth;
  Tile tile;
  int device;
};
template <DType DTYPE, Tile TILE, DType STREAM>
cudaError_t launch_linear_residual(const LinearResidual& p, cudaStream_t stream);

// dh = (dy weight) * act'(h), a = act(h), partials: each row tile's column sums of dh
struct LinearActGrad {
  Matrix dy;        // (M, K)
  Matrix weight;    // (K, N)
  Matrix h;         // (M, N)
  Matrix a;         // (M, N) optional
  Matrix dh;        // (M, N)
  float* partials;  // (ceil(M / tile's rows), N rounded up to tile's columns) optional
  Activation act;
  int64_t rows, cols, depth;
  Tile tile;
  int device;
};
template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_act_grad(const LinearActGrad& p, cudaStream_t stream);

}  // namespace fastvit::sm90
