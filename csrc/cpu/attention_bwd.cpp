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
  ReadHeads dout, q, k, v, out;
  const float *shifts, *inverse_sums;  // (B, H, Nq)
  WrittenHeads dq, dk, dv;
  const ScoreRules& rules;
  const NormGradSums &q_sums, &k_sums;
};

// One head of one sample.
struct BackwardHead {
  int64_t index;
  ReadRows dout, q, k, v, out;
  const float *shifts, *inverse_sums;  // (Nq)
  WrittenRows dq, dk, dv;
  const ScoreRules& rules;
  PreparedHead prepared_q, prepared_k;
  double *q_sums, *k_sums;  // null when not wanted

  BackwardHead(const AttentionBackward& args, int64_t index)
      : index(index),
        dout(args.dout.head(index)),
        q(args.q.head(index)),
        k(args.k.head(index)),
        v(args.v.head(index)),
        out(args.out.head(index)),
        shifts(args.shifts + args.q.first_number(index)),
        inverse_sums(args.inverse_sums + args.q.first_number(index)),
        dq(args.dq.head(index)),
        dk(args.dk.head(index)),
        dv(args.dv.head(index)),
        rules(args.rules),
        prepared_q(args.rules.heads.q, args.q, index),
        prepared_k(args.rules.heads.k, args.k, index),
        q_sums(args.q_sums.head(index)),
        k_sums(args.k_sums.head(index)) {}
};

// Rows of a head as the GEMMs read them: [panel][row][64] over the head dim as right operands, or transposed.
template <class T>
struct QueryPanels {
  T *rows, *transposed;
};

template <class T>
struct BackwardBuffers {
  Operand<T> k, v;
  T *k_transposed, *operand, *weights, *dscores, *dscore_pairs, *prepared;
  QueryPanels<T> q, dout;
  float *scores, *dweights, *dk, *dv, *dq, *mask, *shifts, *inverse_sums, *delta, *head_buffer, *head_grads, *norm_sums;
  int64_t k_ld, block;
};

// (dim, keys) of K, zeros behind the last key.
template <class T>
void transpose_keys(const ReadRows& k, float* sixteen, T* out, int64_t ld) {
  for (int64_t j0 = 0; j0 < k.tokens; j0 += LANES) {
    const int64_t count = std::min(LANES, k.tokens - j0);
    for (int64_t i = 0; i < count; ++i) {
      scale_row(k.row(j0 + i), k.dtype, k.dim, 1.0f, sixteen + i * k.dim, at::kFloat);
    }
    std::fill(sixteen + count * k.dim, sixteen + LANES * k.dim, 0.0f);
    transpose_rows16(sixteen, k.dim, out + j0, ld, c10::CppTypeToScalarType<T>::value);
  }
}

template <class T>
BackwardBuffers<T> load_head(const BackwardHead& head, Scratch& scratch) {
  const int64_t keys = head.k.tokens, dim = head.q.dim, width = round_up(dim, PANEL);
  BackwardBuffers<T> b;
  b.block = ceil_div(keys, ceil_div(keys, KEY_BLOCK));
  b.block = std::min(keys, round_up(b.block, LANES));
  b.k_ld = operand_ld<T>(keys);
  b.head_buffer = scratch.take<float>(head.prepared_q.buffer_size());
  b.head_grads = scratch.take<float>(head.prepared_q.given() ? PANEL * width : 0);
  b.norm_sums = scratch.take<float>(head.prepared_q.has_norm() ? 2 * width : 0);
  b.prepared = scratch.take<T>(head.prepared_q.size<T>(PANEL));
  const ReadRows k = head.prepared_k.read({0, keys}, scratch.take<T>(head.prepared_k.size<T>(keys)), b.head_buffer);
  b.k = head_operand<T>(k, {0, keys}, scratch.take<T>(head.k.operand_size<T>(keys)));
  b.v = head_operand<T>(head.v, {0, keys}, scratch.take<T>(head.v.operand_size<T>(keys)));
  b.operand = scratch.take<T>(std::max(head.q.operand_size<T>(PANEL), head.dout.operand_size<T>(PANEL)));
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
  b.mask = scratch.take<float>(head.rules.mask.given() ? b.block * 2 * PANEL : 0);
  b.k_transposed = scratch.take<T>(dim * b.k_ld);
  transpose_keys(k, scratch.take<float>(LANES * dim), b.k_transposed, b.k_ld);
  if constexpr (sizeof(T) == 2) {
    b.weights = scratch.take<T>(b.block * PANEL);
    b.dscores = scratch.take<T>(b.block * PANEL);
    b.dscore_pairs = scratch.take<T>(padded_k<T>(b.block) * PANEL);
  }
  return b;
}

template <class T>
void pack_queries(const ReadRows& x, Range queries, T* operand, const QueryPanels<T>& panels) {
  const Operand<T> rows = head_operand<T>(x, queries, operand);
  pack_panel_transposed(rows.data, rows.ld, queries.size(), x.dim, panels.transposed);
  for (int64_t p = 0; p < ceil_div(x.dim, PANEL); ++p) {
    pack_panel(rows.data + p * PANEL, rows.ld, std::min(PANEL, x.dim - p * PANEL), queries.size(), nullptr,
               panels.rows + p * PANEL * PANEL);
  }
}

// Of 64 queries; zeros where there is none, which makes its weights zero.
template <class T>
void load_statistics(const BackwardHead& head, Range queries, const BackwardBuffers<T>& b) {
  const int64_t count = queries.size();
  std::fill_n(b.shifts, 3 * PANEL, 0.0f);
  std::copy_n(head.shifts + queries.begin, count, b.shifts);
  std::copy_n(head.inverse_sums + queries.begin, count, b.inverse_sums);
  row_dots(head.dout.row(queries.begin), head.dout.stride, head.out.row(queries.begin), head.out.stride, head.q.dtype,
           count, head.q.dim, b.delta);
}

// The mask of a tile: one value a key, or (keys, 64).
const float* load_mask(const BackwardHead& head, Range queries, Range keys, float* buffer) {
  const ScoreMask& mask = head.rules.mask;
  if (!mask.given()) return nullptr;
  if (mask.same_for_queries()) {
    mask.row(head.index, queries.begin, keys, buffer);
    return buffer;
  }
  float* rows = buffer + keys.size() * PANEL;
  for (int64_t i = 0; i < queries.size(); ++i) mask.row(head.index, queries.begin + i, keys, rows + i * keys.size());
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
void backward_tile(const BackwardHead& head, Range queries, Range keys, const BackwardBuffers<T>& b) {
  const ScoreRules& rules = head.rules;
  const int64_t dim = head.q.dim, columns = round_up(queries.size(), LANES), count = keys.size();
  const int64_t depth = padded_k<T>(dim), step = sum_step(std::min(head.q.tokens, head.k.tokens));
  gemm_panel<T>({b.k.data + keys.begin * b.k.ld, b.k.ld, b.q.transposed, b.scores, PANEL, count, depth, false, columns,
                 nullptr, true, step});
  gemm_panel<T>({b.v.data + keys.begin * b.v.ld, b.v.ld, b.dout.transposed, b.dweights, PANEL, count, depth, false,
                 columns, nullptr, true, step});
  const ScoreOperands<T> scores =
      finish_scores({b.scores, b.dweights, count, columns, rules.scale, b.shifts, b.inverse_sums, b.delta,
                     load_mask(head, queries, keys, b.mask), rules.mask.given() && rules.mask.same_for_queries(),
                     rules.causal, keys.begin, queries.begin, rules.dropout, head.index},
                    b);
  const int64_t query_k = padded_k<T>(queries.size());
  const bool add = rules.causal || queries.begin > 0;
  for (int64_t p = 0; p < ceil_div(dim, PANEL); ++p) {
    const int64_t at = (p * head.k.tokens + keys.begin) * PANEL, width = tile_columns(dim, p);
    gemm_tile({scores.weights, PANEL, b.dout.rows + p * PANEL * PANEL, b.dv + at, PANEL, count, query_k, add, width});
    gemm_tile({scores.dscores, PANEL, b.q.rows + p * PANEL * PANEL, b.dk + at, PANEL, count, query_k, add, width});
  }
  gemm_tile({b.k_transposed + keys.begin, b.k_ld, scores.dscore_panel, b.dq, PANEL, dim, padded_k<T>(count),
             keys.begin > 0, columns, nullptr, /*packed=*/false, sum_step(dim)});
}

void store_rows(const float* sums, const WrittenRows& out) {
  for (int64_t p = 0; p < ceil_div(out.dim, PANEL); ++p) {
    store_biased({sums + p * out.tokens * PANEL, PANEL, out.tokens, std::min(PANEL, out.dim - p * PANEL), ZEROS},
                 {out.data + p * PANEL * out.item(), out.stride, out.dtype});
  }
}

// The gradients (tokens, D) of prepared rows, as those of what they were.
void store_prepared(const PreparedHead& prepared, Range tokens, const float* grads, int64_t ld, const WrittenRows& out,
                    double* sums, float* group, float* buffer) {
  const int64_t width = round_up(out.dim, PANEL);
  HeadGradRows rows{grads, ld, out.row(tokens.begin), out.stride, nullptr, nullptr};
  if (sums) {
    std::fill_n(group, 2 * width, 0.0f);
    rows.dweight = group;
    rows.dbias = group + width;
  }
  prepare_heads_backward(prepared.rows_in(tokens, buffer), rows);
  if (sums) add_to(sums, group, 2 * width);
}

template <class T>
void store_queries(const BackwardHead& head, Range queries, const BackwardBuffers<T>& b) {
  const WrittenRows& out = head.dq;
  if (!head.prepared_q.given()) {
    store_transposed({b.dq, out.dim, queries.size(), nullptr, out.row(queries.begin), out.stride, out.dtype});
    return;
  }
  const int64_t ld = round_up(out.dim, PANEL);
  store_transposed({b.dq, out.dim, queries.size(), nullptr, b.head_grads, ld, at::kFloat});
  store_prepared(head.prepared_q, queries, b.head_grads, ld, out, head.q_sums, b.norm_sums, b.head_buffer);
}

template <class T>
void store_keys(const BackwardHead& head, const BackwardBuffers<T>& b) {
  const int64_t keys = head.k.tokens, ld = round_up(head.k.dim, PANEL);
  if (!head.prepared_k.given()) {
    store_rows(b.dk, head.dk);
    return;
  }
  for (int64_t k0 = 0; k0 < keys; k0 += PANEL) {
    const Range tokens{k0, std::min(keys, k0 + PANEL)};
    for (int64_t i = 0; i < tokens.size() * (ld / PANEL); ++i) {
      const int64_t row = i / (ld / PANEL), p = i % (ld / PANEL);
      std::copy_n(b.dk + (p * keys + k0 + row) * PANEL, PANEL, b.head_grads + row * ld + p * PANEL);
    }
    store_prepared(head.prepared_k, tokens, b.head_grads, ld, head.dk, head.k_sums, b.norm_sums, b.head_buffer);
  }
}

template <class T>
void backward_head(const BackwardHead& head) {
  const int64_t tokens = head.q.tokens, all_keys = head.k.tokens;
  Scratch scratch;
  const BackwardBuffers<T> b = load_head<T>(head, scratch);
  if (head.rules.causal) {
    std::fill_n(b.dk, all_keys * round_up(head.k.dim, PANEL), 0.0f);
    std::fill_n(b.dv, all_keys * round_up(head.k.dim, PANEL), 0.0f);
  }
  for (int64_t q0 = 0; q0 < tokens; q0 += PANEL) {
    const Range queries{q0, std::min(tokens, q0 + PANEL)};
    const ReadRows q = head.prepared_q.read(queries, b.prepared, b.head_buffer);
    pack_queries(q, {0, queries.size()}, b.operand, b.q);
    pack_queries(head.dout, queries, b.operand, b.dout);
    load_statistics(head, queries, b);
    const int64_t keys = head.rules.causal ? std::min(all_keys, round_up(queries.end, PANEL)) : all_keys;
    for (int64_t k0 = 0; k0 < keys; k0 += b.block) {
      backward_tile(head, queries, {k0, std::min(keys, k0 + b.block)}, b);
    }
    store_queries(head, queries, b);
  }
  store_keys(head, b);
  store_rows(b.dv, head.dv);
  gemm_release<T>();
}

void check_gradient(const char* name, const Tensor& grad, const Tensor& like, const char* like_name) {
  constexpr const char* op = "attention";
  check_shape(op, name, grad, like.sizes(), like_name);
  check_same_dtype(op, name, grad, "q", like);
  TORCH_CHECK_VALUE(grad.stride(3) == 1 || grad.size(3) == 1, op, ": ", name, " has stride ", grad.stride(3),
                    " in its last dimension, expected 1");
}

// The tensors of a backward call.
struct Gradients {
  const Tensor &dout, &q, &k, &v, &out, &dq, &dk, &dv;
};

void check_gradients(const Gradients& t) {
  constexpr const char* op = "attention";
  check_shape(op, "dout", t.dout, t.q.sizes(), "like q");
  check_same_dtype(op, "dout", t.dout, "q", t.q);
  check_shape(op, "out", t.out, t.q.sizes(), "like q");
  check_same_dtype(op, "out", t.out, "q", t.q);
  check_gradient("dq", t.dq, t.q, "like q");
  check_gradient("dk", t.dk, t.k, "like k");
  check_gradient("dv", t.dv, t.v, "like v");
}

const float* checked_statistics(const char* name, const Tensor& values, at::IntArrayRef sizes) {
  constexpr const char* op = "attention";
  check_shape(op, name, values, sizes, "like q");
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.is_contiguous(), op, ": ", name, " has dtype ",
                    values.scalar_type(), ", expected contiguous float32");
  return values.const_data_ptr<float>();
}

// The gradients of the norms' weights and biases, (2, D) for q and k; (2, 0) without norms.
std::tuple<Tensor, Tensor> backward(const Gradients& t, const ScoreRules& rules, at::IntArrayRef bounds,
                                    const float* shifts, const float* inverse_sums) {
  const int64_t all_heads = (bounds.empty() ? t.q.size(0) : static_cast<int64_t>(bounds.size()) - 1) * t.q.size(1);
  const NormGradSums q_sums(rules.heads.q.norm != HeadNorm::none, all_heads, t.q.size(3));
  const NormGradSums k_sums(rules.heads.k.norm != HeadNorm::none, all_heads, t.q.size(3));
  if (t.q.numel() == 0) {
    t.dk.zero_();
    t.dv.zero_();
    return {q_sums.result(), k_sums.result()};
  }
  const auto read = [&](const Tensor& tensor) { return ReadHeads(tensor, bounds); };
  const auto written = [&](const Tensor& tensor) { return WrittenHeads(tensor, bounds); };
  const AttentionBackward args{read(t.dout), read(t.q),    read(t.k),     read(t.v),     read(t.out),
                               shifts,       inverse_sums, written(t.dq), written(t.dk), written(t.dv),
                               rules,        q_sums,       k_sums};
  const std::vector<int64_t> samples = longest_first(args.q, args.k);
  const int64_t count = args.q.heads();
  with_compute_type(compute_dtype(t.q.scalar_type()), [&]<class T>(T) {
    parallel_tasks(static_cast<int64_t>(samples.size()) * count,
                   [&](int64_t i) { backward_head<T>(BackwardHead(args, samples[i / count] * count + i % count)); });
  });
  return {q_sums.result(), k_sums.result()};
}

}  // namespace

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& attn_mask, bool is_causal, const Tensor& out, const Tensor& statistics,
                   double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const NoAutograd no_autograd;
  check_attention(q, k, v, attn_mask);
  const Gradients tensors{dout, q, k, v, out, dq, dk, dv};
  check_gradients(tensors);
  const float* numbers = checked_statistics("statistics", statistics, {2, q.size(0), q.size(1), q.size(2)});
  const ScoreRules rules = score_rules(q, k, attn_mask, is_causal, scale);
  backward(tensors, rules, {}, numbers, numbers + statistics.numel() / 2);
}

std::tuple<Tensor, Tensor> attention_general_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& shifts,
    const Tensor& inverse_sums, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const std::string& norm, double q_eps, double k_eps,
    const OptionalTensor& rope, int64_t num_prefix, bool half, const OptionalTensor& attn_mask, bool is_causal,
    double dropout_p, const OptionalTensor& dropout_seed, double scale, const OptionalTensor& cu_seqlens,
    const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const NoAutograd no_autograd;
  check_attention(q, k, v, attn_mask, present(cu_seqlens));
  const std::vector<int64_t> bounds = check_bounds(q, k, attn_mask, cu_seqlens);
  const Gradients tensors{dout, q, k, v, out, dq, dk, dv};
  check_gradients(tensors);
  const std::vector<int64_t> sizes{q.size(0), q.size(1), q.size(2)};
  const HeadOptions heads{q_weight, q_bias, k_weight, k_bias, norm, q_eps, k_eps, rope, num_prefix, half};
  const ScoreRules rules =
      score_rules(q, k, attn_mask, is_causal, scale, Dropout(dropout_p, dropout_seed), preparations(heads, q, k));
  return backward(tensors, rules, bounds, checked_statistics("shifts", shifts, sizes),
                  checked_statistics("inverse_sums", inverse_sums, sizes));
}

}  // namespace fastvit::cpu
