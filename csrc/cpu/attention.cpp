// Attention forward. A task packs the keys and values of a head and takes blocks of its queries: all scores of a block
// are made at once and stay in L2, so the softmax has the exact row maximum and rows do not depend on the blocks.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "op_checks.h"
#include "ops.h"

namespace fastvit::cpu {
namespace {

constexpr int64_t MAX_QUERY_ROWS = 48;
constexpr int64_t SCORE_BYTES = 384 << 10;  // scores of a block of queries
constexpr int64_t PACK_BLOCKS = 1;          // packing keys and values costs about as much as this many blocks

struct AttentionForward {
  ReadHeads q, k, v;
  WrittenHeads out;
  float *shifts, *inverse_sums;  // (B, H, Nq)
  const ScoreRules& rules;
};

// One head of one sample.
struct ForwardHead {
  int64_t index;
  ReadRows q, k, v;
  WrittenRows out;
  float *shifts, *inverse_sums;  // (Nq)
  const ScoreRules& rules;
  PreparedHead prepared_q, prepared_k;

  ForwardHead(const AttentionForward& args, int64_t index)
      : index(index),
        q(args.q.head(index)),
        k(args.k.head(index)),
        v(args.v.head(index)),
        out(args.out.head(index)),
        shifts(args.shifts + args.q.first_number(index)),
        inverse_sums(args.inverse_sums + args.q.first_number(index)),
        rules(args.rules),
        prepared_q(args.rules.heads.q, args.q, index),
        prepared_k(args.rules.heads.k, args.k, index) {}
};

// What a thread takes at a time: blocks of queries of a head, which share one packing of its keys and values.
struct ForwardTask {
  int64_t head;
  Range blocks;
};

int64_t query_rows(int64_t keys) {
  const int64_t rows = SCORE_BYTES / (keys * static_cast<int64_t>(sizeof(float)));
  return std::clamp<int64_t>(rows / 6 * 6, 6, MAX_QUERY_ROWS);
}

// Groups of query blocks a head when there are `heads` like it: enough to keep every thread busy, and no more.
int64_t plan_groups(int64_t heads, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  int64_t best = 1, best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t groups = 1; groups <= std::min(blocks, threads); ++groups) {
    const int64_t cost = ceil_div(heads * groups, threads) * (ceil_div(blocks, groups) + PACK_BLOCKS);
    if (cost < best_cost) best = groups, best_cost = cost;
  }
  return best;
}

// A sample is cut as if all the work were in heads like its own: it may be all, or one of many.
std::vector<ForwardTask> plan_tasks(const ReadHeads& q, const ReadHeads& k) {
  const std::vector<int64_t> samples = longest_first(q, k);
  const auto cost = [&](int64_t sample) {
    const int64_t keys = k.tokens(sample);
    return (q.tokens(sample) + PACK_BLOCKS * query_rows(keys)) * keys;
  };
  int64_t total = 0;
  for (const int64_t sample : samples) total += cost(sample) * q.heads();
  std::vector<ForwardTask> tasks;
  tasks.reserve(samples.size() * q.heads());
  for (const int64_t sample : samples) {
    const int64_t blocks = ceil_div(q.tokens(sample), query_rows(k.tokens(sample)));
    const int64_t groups = plan_groups(ceil_div(total, cost(sample)), blocks);
    for (int64_t i = 0; i < q.heads() * groups; ++i) {
      tasks.push_back({sample * q.heads() + i / groups, piece(blocks, groups, i % groups)});
    }
  }
  return tasks;
}

template <class T>
struct ForwardBuffers {
  T *k_panels, *v_panels, *operand, *weights, *prepared;
  float *scores, *mask, *products, *factors, *head_buffer;
  int64_t ld;

  ForwardBuffers(const ForwardHead& head, int64_t rows, Scratch& scratch) : ld(operand_ld<float>(head.k.tokens)) {
    const int64_t keys = head.k.tokens, dim = head.q.dim;
    k_panels = scratch.take<T>(ceil_div(keys, PANEL) * PANEL * padded_k<T>(dim));
    v_panels = scratch.take<T>(ceil_div(dim, PANEL) * PANEL * padded_k<T>(keys));
    operand = scratch.take<T>(std::max(head.k.operand_size<T>(keys), head.v.operand_size<T>(keys)) +
                              head.q.operand_size<T>(rows));
    scores = scratch.take<float>(rows * ld);
    products = scratch.take<float>(rows * PANEL);
    mask = scratch.take<float>(head.rules.mask.given() ? rows * ld : 0);
    factors = scratch.take<float>(rows);
    prepared = scratch.take<T>(std::max(head.prepared_k.size<T>(keys), head.prepared_q.size<T>(rows)));
    head_buffer = scratch.take<float>(head.prepared_q.buffer_size());
    weights = weights_for(scores, scratch, rows * ld);
  }

 private:
  // float32 weights take the place of the scores
  static float* weights_for(float* scores, Scratch&, int64_t)
    requires std::is_same_v<T, float>
  {
    return scores;
  }
  static T* weights_for(float*, Scratch& scratch, int64_t count) { return scratch.take<T>(count); }
};

// Rows of a head are far apart, where no processor fetches ahead by itself.
template <class Byte>
RowLines lines_of(const HeadRows<Byte>& x, int64_t token) {
  return {static_cast<const char*>(x.row(token)), x.stride * x.item(), x.dim * x.item()};
}
void fetch_rows(const ReadRows& x) {
  const RowLines lines = lines_of(x, 0);
  for (int64_t row = 0; row < x.tokens; ++row) {
    for (int64_t i = 0; i < lines.bytes; i += CACHE_LINE) __builtin_prefetch(lines.data + row * lines.stride + i, 0, 3);
  }
}

template <class T>
void pack_keys_and_values(const ForwardHead& head, const ForwardBuffers<T>& buffers) {
  const int64_t keys = head.k.tokens, dim = head.q.dim;
  fetch_rows(head.k);
  fetch_rows(head.v);
  const ReadRows k_rows = head.prepared_k.read({0, keys}, buffers.prepared, buffers.head_buffer);
  const Operand<T> k = head_operand<T>(k_rows, {0, keys}, buffers.operand);
  for (int64_t p = 0; p < ceil_div(keys, PANEL); ++p) {
    pack_panel_transposed(k.data + p * PANEL * k.ld, k.ld, std::min(PANEL, keys - p * PANEL), dim,
                          buffers.k_panels + p * PANEL * padded_k<T>(dim));
  }
  const Operand<T> v = head_operand<T>(head.v, {0, keys}, buffers.operand);
  for (int64_t p = 0; p < ceil_div(dim, PANEL); ++p) {
    pack_panel(v.data + p * PANEL, v.ld, std::min(PANEL, dim - p * PANEL), keys, nullptr,
               buffers.v_panels + p * PANEL * padded_k<T>(keys));
  }
}

// What the products of a block are multiplied by, one a row.
template <class T>
const float* output_factors(const ForwardHead& head, Range queries, const ForwardBuffers<T>& buffers) {
  const float* inverse_sums = head.inverse_sums + queries.begin;
  if (!head.rules.dropout.given) return inverse_sums;
  for (int64_t r = 0; r < queries.size(); ++r) buffers.factors[r] = inverse_sums[r] * head.rules.dropout.scale;
  return buffers.factors;
}

template <class T>
void attend_block(const ForwardHead& head, Range queries, const ForwardBuffers<T>& buffers) {
  const ScoreRules& rules = head.rules;
  const int64_t rows = queries.size(), dim = head.q.dim, all_keys = head.k.tokens, ld = buffers.ld;
  // Whole panels: few different sizes, since each makes the bfloat16 GEMM build a kernel.
  const int64_t keys = rules.causal ? std::min(all_keys, round_up(queries.end, PANEL)) : all_keys;
  const ReadRows q_rows = head.prepared_q.read(queries, buffers.prepared, buffers.head_buffer);
  const Operand<T> q = head_operand<T>(q_rows, {0, rows}, buffers.operand);
  for (int64_t p = 0; p < ceil_div(keys, PANEL); ++p) {
    gemm_panel<T>({q.data, q.ld, buffers.k_panels + p * PANEL * padded_k<T>(dim), buffers.scores + p * PANEL, ld, rows,
                   padded_k<T>(dim), false, tile_columns(keys, p), nullptr, true,
                   sum_step(std::min(head.q.tokens, all_keys))});
  }
  const bool one_mask_row = rules.mask.given() && rules.mask.same_for_queries();
  for (int64_t r = 0; rules.mask.given() && r < (one_mask_row ? 1 : rows); ++r) {
    rules.mask.row(head.index, queries.begin + r, {0, keys}, buffers.mask + r * ld);
  }
  softmax_rows({buffers.scores, ld, rows, keys, rules.scale, rules.mask.given() ? buffers.mask : nullptr,
                one_mask_row ? 0 : ld, queries.begin, rules.causal, buffers.weights, ld,
                c10::CppTypeToScalarType<T>::value, head.shifts + queries.begin, head.inverse_sums + queries.begin,
                rules.dropout, head.index});
  const float* factors = output_factors(head, queries, buffers);
  char* out = static_cast<char*>(head.out.row(queries.begin));
  for (int64_t p = 0; p < ceil_div(dim, PANEL); ++p) {
    GemmTile<T> tile{buffers.weights,   ld,    buffers.v_panels + p * PANEL * padded_k<T>(all_keys),
                     buffers.products,  PANEL, rows,
                     padded_k<T>(keys), false, tile_columns(dim, p),
                     nullptr,           true,  sum_step(dim)};
    if (p == 0) {
      tile.written = lines_of(head.out, queries.begin);
      if (queries.end + rows <= head.q.tokens) tile.read = lines_of(head.q, queries.end);
    }
    gemm_panel<T>(tile);
    store_scaled(buffers.products, rows, std::min(PANEL, dim - p * PANEL), factors,
                 {out + p * PANEL * head.out.item(), head.out.stride, head.out.dtype});
  }
}

template <class T>
void attention_forward(const AttentionForward& args) {
  const std::vector<ForwardTask> tasks = plan_tasks(args.q, args.k);
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const ForwardHead head(args, tasks[i].head);
    const Range blocks = tasks[i].blocks;
    const int64_t rows = query_rows(head.k.tokens);
    Scratch scratch;
    const ForwardBuffers<T> buffers(head, rows, scratch);
    pack_keys_and_values(head, buffers);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      attend_block(head, {block * rows, std::min(head.q.tokens, (block + 1) * rows)}, buffers);
    }
    gemm_release<T>();
  });
}

}  // namespace

ScoreMask::ScoreMask(const OptionalTensor& mask, at::IntArrayRef sizes) : heads(sizes[1]) {
  if (!present(mask)) return;
  const bool known = mask->scalar_type() == at::kBool || mask->scalar_type() == at::kFloat ||
                     mask->scalar_type() == at::kBFloat16 || mask->scalar_type() == at::kHalf;
  Tensor values = known ? *mask : mask->to(at::kFloat);
  if (values.dim() > 0 && values.size(-1) > 1 && values.stride(-1) != 1) values = values.contiguous();
  tensor = values.expand(sizes);
}

ScoreRules score_rules(const Tensor& q, const Tensor& k, const OptionalTensor& attn_mask, bool is_causal, double scale,
                       const Dropout& dropout, const Preparations& heads) {
  const ScoreMask mask(attn_mask, {q.size(0), q.size(1), q.size(2), k.size(2)});
  return {mask, is_causal, static_cast<float>(scale), dropout, heads};
}

HeadRowsIn PreparedHead::rows_in(Range tokens, float* buffer) const {
  const auto address = [](const Tensor& vector) { return vector.defined() ? vector.const_data_ptr<float>() : nullptr; };
  HeadRowsIn in{rows_.row(tokens.begin),
                rows_.stride,
                rows_.dtype,
                tokens.size(),
                rows_.dim,
                how_.norm,
                how_.eps,
                address(how_.weight),
                address(how_.bias),
                nullptr,
                0,
                0,
                how_.half,
                buffer};
  if (!angles_) return in;
  const int64_t row = first_token_ + tokens.begin - how_.num_prefix;  // of the table
  in.angles_stride = how_.table.stride(2);
  in.angles = angles_ + std::max<int64_t>(row, 0) * in.angles_stride;
  in.unrotated = std::max<int64_t>(-row, 0);
  return in;
}

void ScoreMask::row(int64_t head, int64_t query, Range keys, float* out) const {
  const int64_t key_stride = tensor.stride(3), begin = head / heads * tensor.stride(0) +
                                                       head % heads * tensor.stride(1) + query * tensor.stride(2) +
                                                       keys.begin * key_stride;
  const int64_t count = key_stride == 0 ? 1 : keys.size();
  if (tensor.scalar_type() == at::kBool) {
    const bool* keep = tensor.const_data_ptr<bool>() + begin;
    for (int64_t j = 0; j < count; ++j) out[j] = keep[j] ? 0.0f : -std::numeric_limits<float>::infinity();
  } else {
    const char* values = static_cast<const char*>(tensor.const_data_ptr()) + begin * tensor.element_size();
    scale_row(values, tensor.scalar_type(), count, 1.0f, out, at::kFloat);
  }
  if (count < keys.size()) std::fill_n(out + 1, keys.size() - 1, out[0]);
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask, bool ragged) {
  constexpr const char* op = "attention";
  check_tensor(op, "q", q);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) >= 1, op, ": q has shape ", shape_text(q.sizes()),
                    ", expected (B, H, N, D) with D of at least 1");
  check_tensor(op, "k", k);
  TORCH_CHECK_VALUE(k.dim() == 4 && (ragged || k.size(2) >= 1), op, ": k has shape ", shape_text(k.sizes()),
                    ", expected (B, H, Nk, D) with at least one token");
  check_shape(op, "k", k, {q.size(0), q.size(1), k.size(2), q.size(3)}, "like q");
  check_shape(op, "v", v, k.sizes(), "like k");
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);
  if (!present(attn_mask)) return;
  const std::vector<int64_t> scores{q.size(0), q.size(1), q.size(2), k.size(2)};
  TORCH_CHECK_VALUE(attn_mask->device().is_cpu(), op, ": attn_mask is on ", attn_mask->device(), ", expected the CPU");
  TORCH_CHECK_VALUE(attn_mask->scalar_type() == at::kBool || at::isFloatingType(attn_mask->scalar_type()), op,
                    ": attn_mask has dtype ", attn_mask->scalar_type(), ", expected bool or a floating point dtype");
  bool fits = attn_mask->dim() <= 4;
  for (int64_t i = 1; fits && i <= attn_mask->dim(); ++i) {
    fits = attn_mask->size(-i) == 1 || attn_mask->size(-i) == scores[4 - i];
  }
  TORCH_CHECK_VALUE(fits, op, ": attn_mask has shape ", shape_text(attn_mask->sizes()),
                    ", expected one broadcastable to ", shape_text(scores));
}

std::vector<int64_t> check_bounds(const Tensor& q, const Tensor& k, const OptionalTensor& attn_mask,
                                  const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "attention_varlen";
  if (!present(cu_seqlens)) return {};
  TORCH_CHECK_VALUE(!present(attn_mask), op, ": attn_mask is given, expected none with cu_seqlens");
  TORCH_CHECK_VALUE(q.size(0) == 1 && k.size(2) == q.size(2), op, ": q has shape ", shape_text(q.sizes()),
                    " and k has shape ", shape_text(k.sizes()), ", expected (1, H, T, D) for both");
  const bool rows = cu_seqlens->scalar_type() == at::kInt || cu_seqlens->scalar_type() == at::kLong;
  TORCH_CHECK_VALUE(rows && cu_seqlens->device().is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op,
                    ": cu_seqlens is ", cu_seqlens->scalar_type(), " ", shape_text(cu_seqlens->sizes()), " on ",
                    cu_seqlens->device(), ", expected int32 or int64 (S + 1,) on the CPU");
  const Tensor values = cu_seqlens->to(at::kLong).contiguous();
  std::vector<int64_t> bounds(values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.size(0));
  TORCH_CHECK_VALUE(bounds.front() == 0 && bounds.back() == q.size(2) && std::is_sorted(bounds.begin(), bounds.end()),
                    op, ": cu_seqlens goes from ", bounds.front(), " to ", bounds.back(), ", expected 0 to ", q.size(2),
                    " without falling");
  return bounds;
}

Dropout::Dropout(double p, const OptionalTensor& seed) : given(p > 0.0 && present(seed)) {
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, "attention: dropout_p is ", p, ", expected a probability in [0, 1)");
  if (!given) return;
  TORCH_CHECK_VALUE(seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->device().is_cpu(),
                    "attention: dropout_seed is ", seed->scalar_type(), " ", shape_text(seed->sizes()), " on ",
                    seed->device(), ", expected int64 (1,) on the CPU");
  const auto bits = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  threshold = static_cast<uint32_t>(std::nearbyint(p * (1 << 24)));
  seed_low = static_cast<uint32_t>(bits);
  seed_high = static_cast<uint32_t>(bits >> 32);
  scale = static_cast<float>(1.0 / (1.0 - p));
}

std::vector<int64_t> longest_first(const ReadHeads& q, const ReadHeads& k) {
  std::vector<int64_t> samples;
  samples.reserve(q.samples());
  for (int64_t i = 0; i < q.samples(); ++i) {
    if (q.tokens(i) > 0) samples.push_back(i);
  }
  if (!q.ragged()) return samples;
  const auto work = [&](int64_t sample) { return q.tokens(sample) * k.tokens(sample); };
  std::stable_sort(samples.begin(), samples.end(), [&](int64_t a, int64_t b) { return work(a) > work(b); });
  return samples;
}

namespace {

// (B, H, N, D) stored as (B, N, H, D)
Tensor tokens_first(const Tensor& q) {
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const ScoreRules& rules, at::IntArrayRef bounds,
               float* shifts, float* inverse_sums) {
  const Tensor out = tokens_first(q);
  if (q.numel() == 0) return out;
  const AttentionForward args{ReadHeads(q, bounds),
                              ReadHeads(k, bounds),
                              ReadHeads(v, bounds),
                              WrittenHeads(out, bounds),
                              shifts,
                              inverse_sums,
                              rules};
  with_compute_type(compute_dtype(q.scalar_type()), [&]<class T>(T) { attention_forward<T>(args); });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const OptionalTensor& attn_mask, bool is_causal, double scale) {
  const NoAutograd no_autograd;
  check_attention(q, k, v, attn_mask);
  const ScoreRules rules = score_rules(q, k, attn_mask, is_causal, scale);
  const Tensor statistics = at::empty({2, q.size(0), q.size(1), q.size(2)}, at::kFloat);
  float* numbers = statistics.mutable_data_ptr<float>();
  return {forward(q, k, v, rules, {}, numbers, numbers + statistics.numel() / 2), statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_general_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const std::string& norm, double q_eps, double k_eps,
    const OptionalTensor& rope, int64_t num_prefix, bool half, const OptionalTensor& attn_mask, bool is_causal,
    double dropout_p, const OptionalTensor& dropout_seed, double scale, const OptionalTensor& cu_seqlens) {
  const NoAutograd no_autograd;
  check_attention(q, k, v, attn_mask, present(cu_seqlens));
  const std::vector<int64_t> bounds = check_bounds(q, k, attn_mask, cu_seqlens);
  const HeadOptions heads{q_weight, q_bias, k_weight, k_bias, norm, q_eps, k_eps, rope, num_prefix, half};
  const ScoreRules rules =
      score_rules(q, k, attn_mask, is_causal, scale, Dropout(dropout_p, dropout_seed), preparations(heads, q, k));
  const Tensor shifts = at::empty({q.size(0), q.size(1), q.size(2)}, at::kFloat), inverse_sums = at::empty_like(shifts);
  const Tensor out =
      forward(q, k, v, rules, bounds, shifts.mutable_data_ptr<float>(), inverse_sums.mutable_data_ptr<float>());
  return {out, shifts, inverse_sums};
}

}  // namespace fastvit::cpu
