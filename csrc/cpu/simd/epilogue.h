// What happens to a 64-column tile of products; see ../epilogue.h.
#pragma once

#include "math.h"

namespace fastvit::cpu::FASTVIT_ISA {

template <class S>
FASTVIT_INLINE S* at_row(const TileTarget& target, int64_t row) {
  return static_cast<S*>(target.data) + row * target.stride;
}

// body(row, n, columns from n on) for every sixteen columns; all sixteen are there in most tiles, and known to be.
template <class Body>
FASTVIT_INLINE void each_vector(const TileSource& tile, const Body& body) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (tile.columns == PANEL) {
#pragma GCC unroll 4
      for (int64_t n = 0; n < PANEL; n += LANES) body(r, n, LANES);
    } else {
      for (int64_t n = 0; n < tile.columns; n += LANES) body(r, n, tile.columns - n);
    }
  }
}

FASTVIT_INLINE f32x16 biased(const TileSource& tile, int64_t r, int64_t n) {
  return load16(tile.products + r * tile.ld + n) + load16(tile.bias + n);
}

template <class S>
FASTVIT_INLINE void store_biased_as(const TileSource& tile, const TileTarget& target) {
  each_vector(tile, [&](int64_t r, int64_t n, int64_t left)
                        FASTVIT_ALWAYS_INLINE { store_part(at_row<S>(target, r) + n, biased(tile, r, n), left); });
}

template <class S, Activation A>
FASTVIT_INLINE void store_activated_by(const TileSource& tile, const TileTarget& activated) {
  each_vector(tile, [&](int64_t r, int64_t n, int64_t left) FASTVIT_ALWAYS_INLINE {
    store_part(at_row<S>(activated, r) + n, activate<S, A>(biased(tile, r, n)), left);
  });
}

template <class S>
FASTVIT_INLINE void store_activated_as(const TileSource& tile, Activation act, const TileTarget& activated) {
  switch (act) {
    case Activation::gelu:
      return store_activated_by<S, Activation::gelu>(tile, activated);
    case Activation::gelu_tanh:
      return store_activated_by<S, Activation::gelu_tanh>(tile, activated);
    case Activation::quick_gelu:
      return store_activated_by<S, Activation::quick_gelu>(tile, activated);
  }
}

template <class S>
FASTVIT_INLINE void store_residual_as(const ResidualTile& args) {
  each_vector(args.tile, [&](int64_t r, int64_t n, int64_t left) FASTVIT_ALWAYS_INLINE {
    f32x16 value = biased(args.tile, r, n) * load16(args.layer_scale + n) * args.row_scale(args.first_row + r);
    if (args.residual) value += load_part(static_cast<const S*>(args.residual) + r * args.residual_stride + n, left);
    store_part(at_row<S>(args.target, r) + n, value, left);
  });
}

template <class S, Activation A>
FASTVIT_INLINE void activation_backward_by(const ActivationGradTile& tile) {
  for (int64_t n = 0; n < PANEL; n += LANES) {
    f64x16 sum{};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t left = tile.columns - n, at = r * PANEL + n;
      const S* h_row = static_cast<const S*>(tile.h) + r * tile.h_stride;
      const f32x16 h = left > 0 ? load_part(h_row + n, left) : f32x16{};
      const Gate g = gate_and_slope<A>(h);
      const f32x16 dh = load16(tile.da + at) * (g.value + h * g.slope);
      store16(tile.activated + at, h * g.value);
      store16(tile.dh + at, dh);
      sum += dh;
    }
    add_lanes(tile.column_sum + n, sum);
  }
}

template <class S>
FASTVIT_INLINE void activation_backward_as(const ActivationGradTile& tile, Activation act) {
  switch (act) {
    case Activation::gelu:
      return activation_backward_by<S, Activation::gelu>(tile);
    case Activation::gelu_tanh:
      return activation_backward_by<S, Activation::gelu_tanh>(tile);
    case Activation::quick_gelu:
      return activation_backward_by<S, Activation::quick_gelu>(tile);
  }
}

void store_biased(const TileSource& tile, const TileTarget& target) {
  FASTVIT_BY_DTYPE(target.dtype, store_biased_as, tile, target);
}

void store_activated(const TileSource& tile, Activation act, const TileTarget& activated,
                     const TileTarget& pre_activation) {
  if (pre_activation.data) FASTVIT_BY_DTYPE(pre_activation.dtype, store_biased_as, tile, pre_activation);
  FASTVIT_BY_DTYPE(activated.dtype, store_activated_as, tile, act, activated);
}

void store_residual(const ResidualTile& args) { FASTVIT_BY_DTYPE(args.target.dtype, store_residual_as, args); }

void activation_backward(const ActivationGradTile& tile, Activation act) {
  FASTVIT_BY_DTYPE(tile.h_dtype, activation_backward_as, tile, act);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
