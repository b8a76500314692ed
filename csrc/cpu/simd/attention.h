// The arithmetic of attention between its GEMMs; see ../attention.h.
#pragma once

#include "math.h"
#include "philox.h"

namespace fastvit::cpu::FASTVIT_ISA {

FASTVIT_INLINE f32x16 first_lanes(f32x16 value, int64_t count, float rest) {
  return count >= LANES ? value : select(first(count), value, rest);
}

// A masked score is -inf whatever it was: NaN and inf behind a mask must not show.
FASTVIT_INLINE f32x16 add_mask(f32x16 score, f32x16 mask) { return select(mask == -INF, -INF, score + mask); }

template <bool MASKED>
FASTVIT_INLINE f32x16 score_at(const SoftmaxRows& block, const float* scores, const float* mask, int64_t key,
                               int64_t left) {
  f32x16 score = load16(scores + key) * block.scale;
  if constexpr (MASKED) score = add_mask(score, load_part(mask + key, left));
  return first_lanes(score, left, -INF);
}

template <class S, bool MASKED, bool DROPS>
FASTVIT_INLINE void softmax_row(const SoftmaxRows& block, int64_t r) {
  const int64_t visible = block.causal ? std::min(block.keys, block.first_query + r + 1) : block.keys;
  float* scores = block.scores + r * block.ld;
  const float* mask = MASKED ? block.mask + r * block.mask_ld : nullptr;
  S* weights = static_cast<S*>(block.weights) + r * block.weights_ld;
  f32x16 tops = -INF;
  for (int64_t key = 0; key < visible; key += LANES) {
    const f32x16 score = score_at<MASKED>(block, scores, mask, key, visible - key);
    if constexpr (MASKED) store16(scores + key, score);
    tops = larger(score, tops);
  }
  // Without a number above -inf there is nothing to attend to: zeros, unless a score was NaN.
  const float top = max_lanes(tops), shift = top == -INF ? 0.0f : top;
  f32x16 sums{};
  int64_t key = 0;
  for (; key < visible; key += LANES) {
    const int64_t left = visible - key;
    const f32x16 score = MASKED ? load16(scores + key) : first_lanes(load16(scores + key) * block.scale, left, -INF);
    f32x16 weight = exp16(score - shift);
    sums += weight;
    if constexpr (DROPS) {
      const u32x16 keys = lane_numbers() + u32x16(static_cast<uint32_t>(key));
      weight =
          select(kept(block.dropout, keys, static_cast<uint32_t>(block.first_query + r), block.head), weight, 0.0f);
    }
    store16(weights + key, weight);
  }
  for (; key < block.keys; key += LANES) store16(weights + key, f32x16{});
  const float sum = sum_lanes(sums);
  block.inverse_sums[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
  block.shifts[r] = shift;
}

template <class S, bool DROPS>
FASTVIT_INLINE void softmax_each_row(const SoftmaxRows& block) {
  for (int64_t r = 0; r < block.rows; ++r) {
    if (block.mask) {
      softmax_row<S, true, DROPS>(block, r);
    } else {
      softmax_row<S, false, DROPS>(block, r);
    }
  }
}

template <class S>
FASTVIT_INLINE void softmax_rows_as(const SoftmaxRows& block) {
  if (block.dropout.given) {
    softmax_each_row<S, true>(block);
  } else {
    softmax_each_row<S, false>(block);
  }
}

template <class S>
FASTVIT_INLINE void store_scaled_as(const float* products, int64_t rows, int64_t columns, const float* factors,
                                    const TileTarget& target) {
  for (int64_t r = 0; r < rows; ++r) {
    S* out = static_cast<S*>(target.data) + r * target.stride;
    for (int64_t n = 0; n < columns; n += LANES) {
      store_part(out + n, load16(products + r * PANEL + n) * factors[r], columns - n);
    }
  }
}

template <class S>
FASTVIT_INLINE void row_dots_as(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t rows,
                                int64_t n, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const S *left = static_cast<const S*>(a) + r * a_stride, *right = static_cast<const S*>(b) + r * b_stride;
    f32x16 sum{};
    for (int64_t i = 0; i < n; i += LANES) sum += load_part(left + i, n - i) * load_part(right + i, n - i);
    out[r] = sum_lanes(sum);
  }
}

struct ScoreGrad {
  f32x16 weight, dscore;
};

template <bool DROPS>
FASTVIT_INLINE ScoreGrad score_grad(const ScoreGradTile& tile, int64_t key, int64_t column) {
  const int64_t at = key * PANEL + column;
  f32x16 score = load16(tile.scores + at) * tile.scale;
  if (tile.mask) score = add_mask(score, tile.mask_by_key ? f32x16(tile.mask[key]) : load16(tile.mask + at));
  if (tile.causal) {
    const int64_t hidden = tile.first_key + key - tile.first_query - column;  // queries before the key
    score = select(first(std::clamp<int64_t>(hidden, 0, LANES)), -INF, score);
  }
  const f32x16 weight = exp16(score - load16(tile.shifts + column)) * load16(tile.inverse_sums + column);
  f32x16 dweight = load16(tile.dweights + at), dropped = weight;
  if constexpr (DROPS) {
    const u32x16 queries = lane_numbers() + u32x16(static_cast<uint32_t>(tile.first_query + column));
    const u32x16 keep = kept(tile.dropout, static_cast<uint32_t>(tile.first_key + key), queries, tile.head);
    dweight = select(keep, dweight * tile.dropout.scale, 0.0f);
    dropped = select(keep, weight * tile.dropout.scale, 0.0f);
  }
  return {dropped, weight * (dweight - load16(tile.delta + column)) * tile.scale};
}

// Two bfloat16 rows, and the same with the rows' values side by side.
FASTVIT_INLINE void store_pair(f32x16 even, f32x16 odd, c10::BFloat16* row, int64_t next, c10::BFloat16* pairs) {
  const u32x16 low = bf16_bits(even), high = bf16_bits(odd);
  store_u16(row, low);
  if (next) store_u16(row + next, high);
  if (pairs) {
    const u32x16 pair = low | high << 16;
    store_u32(pairs, pair);
  }
}

void softmax_rows(const SoftmaxRows& block) { FASTVIT_BY_DTYPE(block.dtype, softmax_rows_as, block); }

void store_scaled(const float* products, int64_t rows, int64_t columns, const float* factors,
                  const TileTarget& target) {
  FASTVIT_BY_DTYPE(target.dtype, store_scaled_as, products, rows, columns, factors, target);
}

void row_dots(const void* a, int64_t a_stride, const void* b, int64_t b_stride, at::ScalarType dtype, int64_t rows,
              int64_t n, float* out) {
  FASTVIT_BY_DTYPE(dtype, row_dots_as, a, a_stride, b, b_stride, rows, n, out);
}

template <bool DROPS>
FASTVIT_INLINE void score_gradients_as(const ScoreGradTile& tile) {
  for (int64_t key = 0; key < tile.keys; ++key) {
    for (int64_t column = 0; column < tile.columns; column += LANES) {
      const ScoreGrad grad = score_grad<DROPS>(tile, key, column);
      store16(tile.scores + key * PANEL + column, grad.weight);
      store16(tile.dweights + key * PANEL + column, grad.dscore);
    }
  }
}

template <bool DROPS>
FASTVIT_INLINE void score_gradients_bf16_as(const ScoreGradTile& tile, c10::BFloat16* weights, c10::BFloat16* dscores,
                                            c10::BFloat16* pairs) {
  for (int64_t key = 0; key < tile.keys; key += 2) {
    const int64_t next = key + 1 < tile.keys ? PANEL : 0;
    for (int64_t column = 0; column < tile.columns; column += LANES) {
      const int64_t at = key * PANEL + column;
      const ScoreGrad even = score_grad<DROPS>(tile, key, column);
      const ScoreGrad odd = next ? score_grad<DROPS>(tile, key + 1, column) : ScoreGrad{};
      store_pair(even.weight, odd.weight, weights + at, next, nullptr);
      store_pair(even.dscore, odd.dscore, dscores + at, next, pairs + key * PANEL + 2 * column);
    }
  }
}

void score_gradients(const ScoreGradTile& tile) {
  tile.dropout.given ? score_gradients_as<true>(tile) : score_gradients_as<false>(tile);
}

void score_gradients_bf16(const ScoreGradTile& tile, c10::BFloat16* weights, c10::BFloat16* dscores,
                          c10::BFloat16* pairs) {
  tile.dropout.given ? score_gradients_bf16_as<true>(tile, weights, dscores, pairs)
                     : score_gradients_bf16_as<false>(tile, weights, dscores, pairs);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
