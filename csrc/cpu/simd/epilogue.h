// What happens to a 64-column tile of products; see ../epilogue.h.
#pragma once

#include "math.h"

namespace fastvit::cpu::FASTVIT_ISA {

template <class S>
FASTVIT_INLINE S* at_row(const TileTarget target, int64_t row) {
  return static_cast<S*>(target.data) + row * target.stride;
}

// body(row, n, columns from n on) for every sixteen columns; all sixteen are there in most tiles, and known to be.
// Tiles are passed by value: what is stored might change them otherwise.
template <class Body>
FASTVIT_INLINE void each_vector(const TileSource tile, const Body& body) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (tile.columns == PANEL) {
#pragma GCC unroll 4
      for (int64_t n = 0; n < PANEL; n += LANES) body(r, n, LANES);
    } else {
      for (int64_t n = 0; n < tile.columns; n += LANES) body(r, n, tile.columns - n);
    }
  }
}

FASTVIT_INLINE f32x16 biased(const TileSource tile, int64_t r, int64_t n) {
  return load16(tile.products + r * tile.ld + n) + load16(tile.bias + n);
}

template <class S>
FASTVIT_INLINE void store_biased_as(const TileSource tile, const TileTarget target) {
  each_vector(tile, [&](int64_t r, int64_t n, int64_t left)
                        FASTVIT_ALWAYS_INLINE { store_part(at_row<S>(target, r) + n, biased(tile, r, n), left); });
}

template <class S, Activation A>
FASTVIT_INLINE void store_activated_by(const TileSource tile, const TileTarget activated) {
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
FASTVIT_INLINE void store_residual_as(const ResidualTile args) {
  each_vector(args.tile, [&](int64_t r, int64_t n, int64_t left) FASTVIT_ALWAYS_INLINE {
    f32x16 value = biased(args.tile, r, n) * load16(args.layer_scale + n) * args.row_scale(args.first_row + r);
    if (args.residual) value += load_part(static_cast<const S*>(args.residual) + r * args.residual_stride + n, left);
    store_part(at_row<S>(args.target, r) + n, value, left);
  });
}

// Sixteen columns of a row.
template <class S, Activation A, class T>
FASTVIT_INLINE ActivationGrad activation_grad_at(const ActivationGradTile<T>& tile, int64_t r, int64_t n) {
  const int64_t left = tile.columns - n;
  const S* h_row = static_cast<const S*>(tile.h) + r * tile.h_stride;
  const f32x16 h = left > 0 ? load_part(h_row + n, left) : f32x16{};
  return activation_grad<S, A>(h, load16(tile.da + r * PANEL + n));
}

template <class S, Activation A>
FASTVIT_INLINE void activation_backward_by(const ActivationGradTile<float>& tile) {
  for (int64_t n = 0; n < PANEL; n += LANES) {
    f64x16 sum{};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const ActivationGrad grad = activation_grad_at<S, A>(tile, r, n);
      store16(tile.activated + r * PANEL + n, grad.activated);
      store16(tile.dh + r * PANEL + n, grad.dx);
      if (tile.dh_rows) store16(tile.dh_rows + r * tile.dh_stride + n, grad.dx);
      sum += grad.dx;
    }
    add_lanes(tile.column_sum + n, sum);
  }
}

template <class S, Activation A>
FASTVIT_INLINE void activation_backward_by(const ActivationGradTile<c10::BFloat16>& tile) {
  for (int64_t n = 0; n < PANEL; n += LANES) {
    f64x16 sum{};
    for (int64_t r = 0; r < tile.rows; r += 2) {
      const bool paired = r + 1 < tile.rows;
      const ActivationGrad even = activation_grad_at<S, A>(tile, r, n);
      const ActivationGrad odd = paired ? activation_grad_at<S, A>(tile, r + 1, n) : ActivationGrad{};
      store_pairs(tile.activated + r * PANEL + 2 * n, even.activated, odd.activated);
      store_pairs(tile.dh + r * PANEL + 2 * n, even.dx, odd.dx);
      if (tile.dh_rows) {
        store16(tile.dh_rows + r * tile.dh_stride + n, even.dx);
        if (paired) store16(tile.dh_rows + (r + 1) * tile.dh_stride + n, odd.dx);
      }
      sum += even.dx;
      sum += odd.dx;
    }
    add_lanes(tile.column_sum + n, sum);
  }
}

template <class S, class T>
FASTVIT_INLINE void activation_backward_as(const ActivationGradTile<T>& tile, Activation act) {
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

void activation_backward(const ActivationGradTile<float>& tile, Activation act) {
  FASTVIT_BY_DTYPE(tile.h_dtype, activation_backward_as, tile, act);
}

void activation_backward_bf16(const ActivationGradTile<c10::BFloat16>& tile, Activation act) {
  activation_backward_as<c10::BFloat16>(tile, act);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
