// Attention backward, one task a head. It works on transposed scores, keys x 64 queries, made again from the saved
// statistics, as exactly as in the forward:
//   P^T = exp(scale K Q^T + mask - shift) inverse_sum    dS^T = P^T (V dO^T - delta) scale    delta = rowsum(dO O)
//   dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
// Either one is a left operand as it lies, dS^T a right operand too, so no scores are ever transposed. Nothing is
// summed across threads.
#include "attention.h"
#include "grad.h"
#include "op_checks.h"
#include "ops.h"

namespace fastvit::cpu {
namespace {

constexpr int64_t KEY_BLOCK = 512;  // two (keys, 64) float32 tiles take 256 KB of L2

struct AttentionBackward {
  Heads dout, q, k, v, out;
  ScoreMask mask;
  bool causal;
  float scale;
  const float *shifts, *inverse_sums;  // (B, H, Nq)
  Heads dq, dk, dv;
};

// Rows of a head as the GEMMs read them: [panel][row][64] over the head dim as right operands, or transposed.
template <class T>
struct QueryPanels {
  T *rows, *transposed;
};

template <class T>
struct BackwardBuffers {
  Operand<T> k, v;
  T *k_transposed, *operand, *weights, *dscores, *dscore_pairs, *mask_panel;
  QueryPanels<T> q, dout;
  float *scores, *dweights, *dk, *dv, *dq, *mask, *shifts, *inverse_sums, *delta;
  int64_t k_ld, block;
};

// (dim, keys) of K, zeros behind the last key.
template <class T>
void transpose_keys(const Heads& k, int64_t head, float* sixteen, T* out, int64_t ld) {
  for (int64_t j0 = 0; j0 < k.tokens; j0 += LANES) {
    const int64_t count = std::min(LANES, k.tokens - j0);
    for (int64_t i = 0; i < count; ++i) {
      scale_row(k.row(head, j0 + i), k.dtype(), k.dim, 1.0f, sixteen + i * k.dim, at::kFloat);
    }
    std::fill(sixteen + count * k.dim, sixteen + LANES * k.dim, 0.0f);
    transpose_rows16(sixteen, k.dim, out + j0, ld, c10::CppTypeToScalarType<T>::value);
  }
}

template <class T>
BackwardBuffers<T> load_head(const AttentionBackward& args, int64_t head, Scratch& scratch) {
  const int64_t keys = args.k.tokens, dim = args.q.dim, width = round_up(dim, PANEL);
  BackwardBuffers<T> b;
  b.block = ceil_div(keys, ceil_div(keys, KEY_BLOCK));
  b.block = std::min(keys, round_up(b.block, LANES));
  b.k_ld = operand_ld<T>(keys);
  b.k = head_operand<T>(args.k, head, {0, keys}, scratch.take<T>(args.k.operand_size<T>(keys)));
  b.v = head_operand<T>(args.v, head, {0, keys}, scratch.take<T>(args.v.operand_size<T>(keys)));
  b.operand = scratch.take<T>(std::max(args.q.operand_size<T>(PANEL), args.dout.operand_size<T>(PANEL)));
  b.q = {scratch.take<T>(PANEL * width), scratch.take<T>(PANEL * padded_k<T>(dim))};
  b.dout = {scratch.take<T>(PANEL * width), scratch.take<T>(PANEL * padded_k<T>(dim))};
  b.scores = scratch.take<float>(b.block * PANEL);
  b.dweights = scratch.take<float>(b.block * PANEL);
  b.dk = scratch.take<float>(keys * width);
  b.dv = scratch.take<float>(keys * width);
  b.dq = scratch.take<float>(dim * PANEL);
  b.shifts = scratch.take<float>(3 * PANEL);
  b.inverse_sums = b.shifts + PANEL;
  b.delta = b.inverse_sums + PANEL;
  b.mask = scratch.take<float>(args.mask.given() ? b.block * 2 * PANEL : 0);
  b.k_transposed = scratch.take<T>(dim * b.k_ld);
  transpose_keys(args.k, head, scratch.take<float>(LANES * dim), b.k_transposed, b.k_ld);
  if constexpr (sizeof(T) == 2) {
    b.weights = scratch.take<T>(b.block * PANEL);
    b.dscores = scratch.take<T>(b.block * PANEL);
    b.dscore_pairs = scratch.take<T>(padded_k<T>(b.block) * PANEL);
  }
  return b;
}

template <class T>
void pack_queries(const Heads& x, int64_t head, Range queries, T* operand, const QueryPanels<T>& panels) {
  const Operand<T> rows = head_operand<T>(x, head, queries, operand);
  pack_panel_transposed(rows.data, rows.ld, queries.size(), x.dim, panels.transposed);
  for (int64_t p = 0; p < ceil_div(x.dim, PANEL); ++p) {
    pack_panel(rows.data + p * PANEL, rows.ld, std::min(PANEL, x.dim - p * PANEL), queries.size(), nullptr,
               panels.rows + p * PANEL * PANEL);
  }
}

// Of 64 queries; zeros where there is none, which makes its weights zero.
template <class T>
void load_statistics(const AttentionBackward& args, int64_t head, Range queries, const BackwardBuffers<T>& b) {
  const int64_t first = head * args.q.tokens + queries.begin, count = queries.size();
  std::fill_n(b.shifts, 3 * PANEL, 0.0f);
  std::copy_n(args.shifts + first, count, b.shifts);
  std::copy_n(args.inverse_sums + first, count, b.inverse_sums);
  row_dots(args.dout.row(head, queries.begin), args.dout.stride(), args.out.row(head, queries.begin), args.out.stride(),
           args.q.dtype(), count, args.q.dim, b.delta);
}

// The mask of a tile: one value a key, or (keys, 64).
const float* load_mask(const AttentionBackward& args, int64_t head, Range queries, Range keys, float* buffer) {
  if (!args.mask.given()) return nullptr;
  if (args.mask.same_for_queries()) {
    args.mask.row(head, queries.begin, keys, buffer);
    return buffer;
  }
  float* rows = buffer + keys.size() * PANEL;
  for (int64_t i = 0; i < queries.size(); ++i) args.mask.row(head, queries.begin + i, keys, rows + i * keys.size());
  transpose_panel(rows, keys.size(), queries.size(), keys.size(), buffer);
  return buffer;
}

template <class T>
struct ScoreOperands {
  const T *weights, *dscores, *dscore_panel;
};

ScoreOperands<float> finish_scores(const ScoreGradTile& tile, const BackwardBuffers<float>& b) {
  score_gradients(tile);
  return {b.scores, b.dweights, b.dweights};
}

ScoreOperands<c10::BFloat16> finish_scores(const ScoreGradTile& tile, const BackwardBuffers<c10::BFloat16>& b) {
  score_gradients_bf16(tile, b.weights, b.dscores, b.dscore_pairs);
  return {b.weights, b.dscores, b.dscore_pairs};
}

// A block of keys against 64 queries.
template <class T>
void backward_tile(const AttentionBackward& args, int64_t head, Range queries, Range keys,
                   const BackwardBuffers<T>& b) {
  const int64_t dim = args.q.dim, columns = round_up(queries.size(), LANES), count = keys.size();
  const int64_t depth = padded_k<T>(dim), step = sum_step(std::min(args.q.tokens, args.k.tokens));
  gemm_panel<T>({b.k.data + keys.begin * b.k.ld, b.k.ld, b.q.transposed, b.scores, PANEL, count, depth, false, columns,
                 nullptr, true, step});
  gemm_panel<T>({b.v.data + keys.begin * b.v.ld, b.v.ld, b.dout.transposed, b.dweights, PANEL, count, depth, false,
                 columns, nullptr, true, step});
  const ScoreOperands<T> scores =
      finish_scores({b.scores, b.dweights, count, columns, args.scale, b.shifts, b.inverse_sums, b.delta,
                     load_mask(args, head, queries, keys, b.mask), args.mask.given() && args.mask.same_for_queries(),
                     args.causal, keys.begin, queries.begin},
                    b);
  const int64_t query_k = padded_k<T>(queries.size());
  const bool add = args.causal || queries.begin > 0;
  for (int64_t p = 0; p < ceil_div(dim, PANEL); ++p) {
    const int64_t at = (p * args.k.tokens + keys.begin) * PANEL, width = tile_columns(dim, p);
    gemm_tile({scores.weights, PANEL, b.dout.rows + p * PANEL * PANEL, b.dv + at, PANEL, count, query_k, add, width});
    gemm_tile({scores.dscores, PANEL, b.q.rows + p * PANEL * PANEL, b.dk + at, PANEL, count, query_k, add, width});
  }
  gemm_tile({b.k_transposed + keys.begin, b.k_ld, scores.dscore_panel, b.dq, PANEL, dim, padded_k<T>(count),
             keys.begin > 0, columns, nullptr, /*packed=*/false, sum_step(dim)});
}

void store_rows(const float* sums, const Heads& out, int64_t head) {
  char* rows = static_cast<char*>(out.mutable_row(head, 0));
  for (int64_t p = 0; p < ceil_div(out.dim, PANEL); ++p) {
    store_biased({sums + p * out.tokens * PANEL, PANEL, out.tokens, std::min(PANEL, out.dim - p * PANEL), ZEROS},
                 {rows + p * PANEL * out.tensor.element_size(), out.stride(), out.dtype()});
  }
}

template <class T>
void backward_head(const AttentionBackward& args, int64_t head) {
  const int64_t tokens = args.q.tokens, all_keys = args.k.tokens;
  Scratch scratch;
  const BackwardBuffers<T> b = load_head<T>(args, head, scratch);
  if (args.causal) {
    std::fill_n(b.dk, all_keys * round_up(args.k.dim, PANEL), 0.0f);
    std::fill_n(b.dv, all_keys * round_up(args.k.dim, PANEL), 0.0f);
  }
  for (int64_t q0 = 0; q0 < tokens; q0 += PANEL) {
    const Range queries{q0, std::min(tokens, q0 + PANEL)};
    pack_queries(args.q, head, queries, b.operand, b.q);
    pack_queries(args.dout, head, queries, b.operand, b.dout);
    load_statistics(args, head, queries, b);
    const int64_t keys = args.causal ? std::min(all_keys, round_up(queries.end, PANEL)) : all_keys;
    for (int64_t k0 = 0; k0 < keys; k0 += b.block) {
      backward_tile(args, head, queries, {k0, std::min(keys, k0 + b.block)}, b);
    }
    store_transposed(
        {b.dq, args.q.dim, queries.size(), nullptr, args.dq.mutable_row(head, q0), args.dq.stride(), args.dq.dtype()});
  }
  store_rows(b.dk, args.dk, head);
  store_rows(b.dv, args.dv, head);
  gemm_release<T>();
}

void check_gradient(const char* name, const Tensor& grad, const Tensor& like, const char* like_name) {
  constexpr const char* op = "attention";
  check_shape(op, name, grad, like.sizes(), like_name);
  check_same_dtype(op, name, grad, "q", like);
  TORCH_CHECK_VALUE(grad.stride(3) == 1 || grad.size(3) == 1, op, ": ", name, " has stride ", grad.stride(3),
                    " in its last dimension, expected 1");
}

}  // namespace

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& attn_mask, bool is_causal, const Tensor& out, const Tensor& statistics,
                   double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  constexpr const char* op = "attention";
  const NoAutograd no_autograd;
  check_attention(q, k, v, attn_mask);
  check_shape(op, "dout", dout, q.sizes(), "like q");
  check_same_dtype(op, "dout", dout, "q", q);
  check_shape(op, "out", out, q.sizes(), "like q");
  check_same_dtype(op, "out", out, "q", q);
  check_shape(op, "statistics", statistics, {2, q.size(0), q.size(1), q.size(2)}, "like q");
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kFloat && statistics.is_contiguous(), op, ": statistics has dtype ",
                    statistics.scalar_type(), ", expected contiguous float32");
  check_gradient("dq", dq, q, "like q");
  check_gradient("dk", dk, k, "like k");
  check_gradient("dv", dv, v, "like v");
  if (q.numel() == 0) {
    dk.zero_();
    dv.zero_();
    return;
  }
  const AttentionBackward args{Heads(dout),
                               Heads(q),
                               Heads(k),
                               Heads(v),
                               Heads(out),
                               ScoreMask(attn_mask, {q.size(0), q.size(1), q.size(2), k.size(2)}),
                               is_causal,
                               static_cast<float>(scale),
                               statistics[0].const_data_ptr<float>(),
                               statistics[1].const_data_ptr<float>(),
                               Heads(dq),
                               Heads(dk),
                               Heads(dv)};
  with_compute_type(compute_dtype(q.scalar_type()), [&]<class T>(T) {
    parallel_tasks(args.q.count(), [&](int64_t head) { backward_head<T>(args, head); });
  });
}

}  // namespace fastvit::cpu
