// What happens to a 64-column tile of float32 products while it is still in L1.
#pragma once

#include <ATen/ATen.h>

#include "rows.h"

namespace fastvit::cpu {

enum class Activation { gelu, gelu_tanh, quick_gelu };

// `rows` x `columns` (1..64) of a row-major matrix in memory; null data where nothing is to be written.
struct TileTarget {
  void* data = nullptr;
  int64_t stride = 0;
  at::ScalarType dtype = at::kFloat;
};

struct TileSource {
  const float* products;  // (rows, 64), row stride ld
  int64_t ld, rows, columns;
  const float* bias;  // (64)
};

// target = products + bias
void store_biased(const TileSource& tile, const TileTarget& target);

// activated = act(products + bias), all 64 columns; pre_activation = products + bias
void store_activated(const TileSource& tile, Activation act, const TileTarget& activated,
                     const TileTarget& pre_activation);

// target = residual + row_scale * layer_scale * (products + bias); `residual` null for none
struct ResidualTile {
  TileSource tile;
  const float* layer_scale;  // (64)
  const RowScale& row_scale;
  int64_t first_row;
  const void* residual;
  int64_t residual_stride;
  TileTarget target;  // the residual has its dtype
};
void store_residual(const ResidualTile& args);

// The tile is dA, the gradient of act(h). Writes act(h) and dH = dA * act'(h) as (rows, 64) tiles, dH to its rows in
// memory too where these are wanted, and adds its columns to `column_sum` (64).
template <class T>
struct ActivationGradTile {
  const float* da;  // (rows, 64), row stride 64
  const void* h;    // (rows, columns)
  int64_t h_stride;
  at::ScalarType h_dtype;  // bfloat16 where T is
  int64_t rows, columns;
  T *activated, *dh;  // row stride 64; in bfloat16 two rows side by side, as a panel has them
  T* dh_rows;         // (rows, 64) of a matrix, may be null
  int64_t dh_stride;
  double* column_sum;
};
void activation_backward(const ActivationGradTile<float>& tile, Activation act);
void activation_backward(const ActivationGradTile<c10::BFloat16>& tile, Activation act);

}  // namespace fastvit::cpu
