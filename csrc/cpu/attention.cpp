// Attention forward. A task packs the keys and values of a head and takes blocks of its queries: all scores of a block
// are made at once and stay in L2, so the softmax has the exact row maximum and rows do not depend on the blocks.
#include "attention.h"

#include "op_checks.h"
#include "ops.h"

namespace fastvit::cpu {
namespace {

constexpr int64_t MAX_QUERY_ROWS = 48;
constexpr int64_t SCORE_BYTES = 384 << 10;  // scores of a block of queries
constexpr int64_t PACK_BLOCKS = 1;          // packing keys and values costs about as much as this many blocks

struct AttentionForward {
  Heads q, k, v, out;
  ScoreMask mask;
  bool causal;
  float scale;
  float *shifts, *inverse_sums;  // (B, H, Nq)
};

int64_t query_rows(int64_t keys) {
  const int64_t rows = SCORE_BYTES / (keys * static_cast<int64_t>(sizeof(float)));
  return std::clamp<int64_t>(rows / 6 * 6, 6, MAX_QUERY_ROWS);
}

// Groups of query blocks that share one packing: enough of them to keep every thread busy, and no more.
int64_t plan_groups(int64_t heads, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  int64_t best = 1, best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t groups = 1; groups <= std::min(blocks, threads); ++groups) {
    const int64_t cost = ceil_div(heads * groups, threads) * (ceil_div(blocks, groups) + PACK_BLOCKS);
    if (cost < best_cost) best = groups, best_cost = cost;
  }
  return best;
}

template <class T>
struct ForwardBuffers {
  T *k_panels, *v_panels, *operand, *weights;
  float *scores, *mask, *products;
  int64_t ld;

  ForwardBuffers(const AttentionForward& args, int64_t rows, Scratch& scratch) : ld(operand_ld<float>(args.k.tokens)) {
    const int64_t keys = args.k.tokens, dim = args.q.dim;
    k_panels = scratch.take<T>(ceil_div(keys, PANEL) * PANEL * padded_k<T>(dim));
    v_panels = scratch.take<T>(ceil_div(dim, PANEL) * PANEL * padded_k<T>(keys));
    operand = scratch.take<T>(std::max(args.k.operand_size<T>(keys), args.v.operand_size<T>(keys)) +
                              args.q.operand_size<T>(rows));
    scores = scratch.take<float>(rows * ld);
    products = scratch.take<float>(rows * PANEL);
    mask = scratch.take<float>(args.mask.given() ? rows * ld : 0);
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
RowLines lines_of(const Heads& x, int64_t head, int64_t token) {
  const int64_t item = x.tensor.element_size();
  return {static_cast<const char*>(x.row(head, token)), x.stride() * item, x.dim * item};
}
void fetch_rows(const Heads& x, int64_t head) {
  const RowLines lines = lines_of(x, head, 0);
  for (int64_t row = 0; row < x.tokens; ++row) {
    for (int64_t i = 0; i < lines.bytes; i += CACHE_LINE) __builtin_prefetch(lines.data + row * lines.stride + i, 0, 3);
  }
}

template <class T>
void pack_keys_and_values(const AttentionForward& args, int64_t head, const ForwardBuffers<T>& buffers) {
  const int64_t keys = args.k.tokens, dim = args.q.dim;
  fetch_rows(args.k, head);
  fetch_rows(args.v, head);
  const Operand<T> k = head_operand<T>(args.k, head, {0, keys}, buffers.operand);
  for (int64_t p = 0; p < ceil_div(keys, PANEL); ++p) {
    pack_panel_transposed(k.data + p * PANEL * k.ld, k.ld, std::min(PANEL, keys - p * PANEL), dim,
                          buffers.k_panels + p * PANEL * padded_k<T>(dim));
  }
  const Operand<T> v = head_operand<T>(args.v, head, {0, keys}, buffers.operand);
  for (int64_t p = 0; p < ceil_div(dim, PANEL); ++p) {
    pack_panel(v.data + p * PANEL, v.ld, std::min(PANEL, dim - p * PANEL), keys, nullptr,
               buffers.v_panels + p * PANEL * padded_k<T>(keys));
  }
}

template <class T>
void attend_block(const AttentionForward& args, int64_t head, Range queries, const ForwardBuffers<T>& buffers) {
  const int64_t rows = queries.size(), dim = args.q.dim, all_keys = args.k.tokens, ld = buffers.ld;
  // Whole panels: few different sizes, since each makes the bfloat16 GEMM build a kernel.
  const int64_t keys = args.causal ? std::min(all_keys, round_up(queries.end, PANEL)) : all_keys;
  const Operand<T> q = head_operand<T>(args.q, head, queries, buffers.operand);
  for (int64_t p = 0; p < ceil_div(keys, PANEL); ++p) {
    gemm_panel<T>({q.data, q.ld, buffers.k_panels + p * PANEL * padded_k<T>(dim), buffers.scores + p * PANEL, ld, rows,
                   padded_k<T>(dim), false, tile_columns(keys, p), nullptr, true,
                   sum_step(std::min(args.q.tokens, all_keys))});
  }
  const bool one_mask_row = args.mask.given() && args.mask.same_for_queries();
  for (int64_t r = 0; args.mask.given() && r < (one_mask_row ? 1 : rows); ++r) {
    args.mask.row(head, queries.begin + r, {0, keys}, buffers.mask + r * ld);
  }
  const int64_t first = head * args.q.tokens + queries.begin;
  softmax_rows({buffers.scores, ld, rows, keys, args.scale, args.mask.given() ? buffers.mask : nullptr,
                one_mask_row ? 0 : ld, queries.begin, args.causal, buffers.weights, ld,
                c10::CppTypeToScalarType<T>::value, args.shifts + first, args.inverse_sums + first});
  char* out = static_cast<char*>(args.out.mutable_row(head, queries.begin));
  for (int64_t p = 0; p < ceil_div(dim, PANEL); ++p) {
    GemmTile<T> tile{buffers.weights,   ld,    buffers.v_panels + p * PANEL * padded_k<T>(all_keys),
                     buffers.products,  PANEL, rows,
                     padded_k<T>(keys), false, tile_columns(dim, p),
                     nullptr,           true,  sum_step(dim)};
    if (p == 0) {
      tile.written = lines_of(args.out, head, queries.begin);
      if (queries.end + rows <= args.q.tokens) tile.read = lines_of(args.q, head, queries.end);
    }
    gemm_panel<T>(tile);
    store_scaled(buffers.products, rows, std::min(PANEL, dim - p * PANEL), args.inverse_sums + first,
                 {out + p * PANEL * args.out.tensor.element_size(), args.out.stride(), args.out.dtype()});
  }
}

template <class T>
void attention_forward(const AttentionForward& args) {
  const int64_t rows = query_rows(args.k.tokens), blocks = ceil_div(args.q.tokens, rows);
  const int64_t groups = plan_groups(args.q.count(), blocks);
  parallel_tasks(args.q.count() * groups, [&](int64_t task) {
    const int64_t head = task / groups;
    const Range group = piece(blocks, groups, task % groups);
    Scratch scratch;
    const ForwardBuffers<T> buffers(args, rows, scratch);
    pack_keys_and_values(args, head, buffers);
    for (int64_t i = group.begin; i < group.end; ++i) {
      attend_block(args, head, {i * rows, std::min(args.q.tokens, (i + 1) * rows)}, buffers);
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

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask) {
  constexpr const char* op = "attention";
  check_tensor(op, "q", q);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) >= 1, op, ": q has shape ", shape_text(q.sizes()),
                    ", expected (B, H, N, D) with D of at least 1");
  check_tensor(op, "k", k);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.size(2) >= 1, op, ": k has shape ", shape_text(k.sizes()),
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

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const OptionalTensor& attn_mask, bool is_causal, double scale) {
  const NoAutograd no_autograd;
  check_attention(q, k, v, attn_mask);
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
  const Tensor statistics = at::empty({2, q.size(0), q.size(1), q.size(2)}, at::kFloat);
  if (q.numel() > 0) {
    const AttentionForward args{Heads(q),
                                Heads(k),
                                Heads(v),
                                Heads(out),
                                ScoreMask(attn_mask, {q.size(0), q.size(1), q.size(2), k.size(2)}),
                                is_causal,
                                static_cast<float>(scale),
                                statistics[0].mutable_data_ptr<float>(),
                                statistics[1].mutable_data_ptr<float>()};
    with_compute_type(compute_dtype(q.scalar_type()), [&]<class T>(T) { attention_forward<T>(args); });
  }
  return {out, statistics};
}

}  // namespace fastvit::cpu
