// Attention on the CPU: what its forward and backward share. Samples are read and written where they lie: (B, H, N, D)
// tensors, or ragged rows of (1, H, T, D) ones. All is done head by head, so either kind goes the same way.
#pragma once

#include <vector>

#include "../common.h"
#include "heads.h"
#include "linear.h"

namespace fastvit::cpu {

// The (tokens, dim) matrix of one head of one sample, any row stride; Byte is char where it is written.
template <class Byte>
struct HeadRows {
  using Value = std::conditional_t<std::is_const_v<Byte>, const void, void>;

  Byte* data;
  int64_t stride, tokens, dim;
  at::ScalarType dtype;

  int64_t item() const { return static_cast<int64_t>(c10::elementSize(dtype)); }
  Value* row(int64_t token) const { return data + token * stride * item(); }
  // Can a GEMM in T read the rows where they lie?
  template <class T>
  bool usable_as() const {
    return dtype == c10::CppTypeToScalarType<T>::value && dim % (sizeof(float) / sizeof(T)) == 0;
  }
  // How many T `operand` needs for this many rows.
  template <class T>
  int64_t operand_size(int64_t rows) const {
    return usable_as<T>() ? 0 : rows * operand_ld<T>(dim);
  }
};
using ReadRows = HeadRows<const char>;
using WrittenRows = HeadRows<char>;

// A (B, H, N, D) tensor, any strides but the last. With `bounds` its one sample holds ragged ones: sample s has the
// rows from bounds[s] to bounds[s + 1]. Heads are counted through the samples.
template <class Byte>
class Heads {
 public:
  explicit Heads(const Tensor& values, at::IntArrayRef bounds = {})
      : tensor_(values.stride(3) == 1 || values.size(3) == 1 ? values : values.contiguous()),
        bounds_(bounds),
        all_{first_byte(tensor_), tensor_.stride(2), tensor_.size(2), tensor_.size(3), tensor_.scalar_type()},
        samples_(bounds.empty() ? tensor_.size(0) : static_cast<int64_t>(bounds.size()) - 1),
        heads_(tensor_.size(1)),
        sample_stride_(tensor_.stride(0)),
        head_stride_(tensor_.stride(1)) {}

  int64_t samples() const { return samples_; }
  int64_t heads() const { return heads_; }
  int64_t tokens(int64_t sample) const { return ragged() ? bounds_[sample + 1] - bounds_[sample] : all_.tokens; }
  HeadRows<Byte> head(int64_t index) const {
    const int64_t sample = index / heads_;
    const int64_t first = ragged() ? bounds_[sample] * all_.stride : sample * sample_stride_;
    HeadRows<Byte> rows = all_;
    rows.data += (first + index % heads_ * head_stride_) * all_.item();
    rows.tokens = tokens(sample);
    return rows;
  }
  // The row that a head's first token is of all rows of its sample, or of the ragged ones.
  int64_t first_token(int64_t index) const { return ragged() ? bounds_[index / heads_] : 0; }
  // Where the numbers of a head lie in contiguous (B, H, N), one a row.
  int64_t first_number(int64_t index) const {
    return ragged() ? index % heads_ * all_.tokens + bounds_[index / heads_] : index * all_.tokens;
  }
  bool ragged() const { return !bounds_.empty(); }

 private:
  static Byte* first_byte(const Tensor& tensor) {
    if constexpr (std::is_const_v<Byte>) {
      return static_cast<Byte*>(tensor.const_data_ptr());
    } else {
      return static_cast<Byte*>(tensor.mutable_data_ptr());
    }
  }

  Tensor tensor_;
  at::IntArrayRef bounds_;
  HeadRows<Byte> all_;  // the first head's, with the rows of all ragged samples
  int64_t samples_, heads_, sample_stride_, head_stride_;
};
using ReadHeads = Heads<const char>;
using WrittenHeads = Heads<char>;

// The samples that have rows, those with the most work first, so that threads end together.
std::vector<int64_t> longest_first(const ReadHeads& q, const ReadHeads& k);

// Rows of a head in T, in place when a GEMM can read them there, else in `buffer` with zeros up to an even width.
template <class T>
Operand<T> head_operand(const ReadRows& x, Range rows, T* buffer) {
  if (x.usable_as<T>()) return {static_cast<const T*>(x.row(rows.begin)), x.stride};
  const int64_t ld = operand_ld<T>(x.dim);
  for (int64_t i = 0; i < rows.size(); ++i) {
    T* out = buffer + i * ld;
    scale_row(x.row(rows.begin + i), x.dtype, x.dim, 1.0f, out, c10::CppTypeToScalarType<T>::value);
    for (int64_t k = x.dim; k < padded_k<T>(x.dim); ++k) out[k] = 0.0f;
  }
  return {buffer, ld};
}

// How the rows of one head of q or k are prepared; nothing happens when `how` is not given.
class PreparedHead {
 public:
  PreparedHead(const Preparation& how, const ReadHeads& heads, int64_t index)
      : how_(how), rows_(heads.head(index)), first_token_(heads.first_token(index)) {
    if (!how.table.defined() || how.table.size(2) == 0) return;
    const int64_t sample = how.table.size(0) == 1 ? 0 : index / heads.heads();
    const int64_t head = how.table.size(1) == 1 ? 0 : index % heads.heads();
    angles_ = how.table.const_data_ptr<float>() + sample * how.table.stride(0) + head * how.table.stride(1);
  }

  bool given() const { return how_.given(); }
  bool has_norm() const { return how_.norm != HeadNorm::none; }
  // How much `rows_in` needs of floats, and `read` of T for so many rows.
  int64_t buffer_size() const { return given() ? HEAD_BUFFERS * round_up(rows_.dim, PANEL) : 0; }
  template <class T>
  int64_t size(int64_t rows) const {
    return given() ? rows * operand_ld<T>(rows_.dim) : 0;
  }
  HeadRowsIn rows_in(Range tokens, float* buffer) const;
  // The rows `tokens` as the products have them: where they lie, or prepared in `out`.
  template <class T>
  ReadRows read(Range tokens, T* out, float* buffer) const {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    ReadRows rows = rows_;
    rows.tokens = tokens.size();
    if (!given()) {
      rows.data = static_cast<const char*>(rows_.row(tokens.begin));
      return rows;
    }
    const int64_t ld = operand_ld<T>(rows_.dim);
    prepare_heads(rows_in(tokens, buffer), out, ld, dtype);
    return {reinterpret_cast<const char*>(out), ld, tokens.size(), rows_.dim, dtype};
  }

 private:
  const Preparation& how_;
  ReadRows rows_;
  int64_t first_token_;
  const float* angles_ = nullptr;
};

// What is added to the scores, (B, H, Nq, Nk) with zero strides where one value serves all; a False adds -inf.
struct ScoreMask {
  Tensor tensor;  // undefined for none
  int64_t heads = 1;

  ScoreMask() = default;
  ScoreMask(const OptionalTensor& mask, at::IntArrayRef sizes);

  bool given() const { return tensor.defined(); }
  bool same_for_queries() const { return tensor.size(2) == 1 || tensor.stride(2) == 0; }
  // `keys` of one query in float32.
  void row(int64_t head, int64_t query, Range keys, float* out) const;
};

// Which weights are kept: a function of the seed and a weight's place, so that the backward draws the same again.
// Meaning: fastvit.reference.dropout_keeps.
struct Dropout {
  bool given = false;
  uint32_t threshold = 0;  // a weight is kept when 24 random bits reach it
  uint32_t seed_low = 0, seed_high = 0;
  float scale = 1.0f;  // of the weights that are kept

  Dropout() = default;
  Dropout(double p, const OptionalTensor& seed);
};

// What changes the scores or the weights, beside their scale, and what q and k are before.
struct ScoreRules {
  ScoreMask mask;
  bool causal = false;
  float scale = 1.0f;
  Dropout dropout;
  Preparations heads = {};
};

ScoreRules score_rules(const Tensor& q, const Tensor& k, const OptionalTensor& attn_mask, bool is_causal, double scale,
                       const Dropout& dropout = {}, const Preparations& heads = {});

// The argument rules that both directions share.
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask,
                     bool ragged = false);
// Of ragged samples in (1, H, T, D); the values of cu_seqlens.
std::vector<int64_t> check_bounds(const Tensor& q, const Tensor& k, const OptionalTensor& attn_mask,
                                  const OptionalTensor& cu_seqlens);

// Columns of panel `p` of `size`, up to a multiple of 16.
inline int64_t tile_columns(int64_t size, int64_t p) { return round_up(std::min(PANEL, size - p * PANEL), 16); }

// How many products are summed before they join a total. Stock PyTorch adds those of a narrow matrix (few queries, keys
// or dims) in partial sums, so that they round less; steps of sixteen round as little, and cost nothing where there are
// few.
constexpr int64_t SUM_STEP = 128, NARROW = 32;
inline int64_t sum_step(int64_t narrowest) { return narrowest <= NARROW ? LANES : SUM_STEP; }

// The exponentials of a block of scores, weights = exp(score - shift), and their row sums.
struct SoftmaxRows {
  float* scores;  // (rows, keys up to a multiple of 16), row stride ld; overwritten when there is a mask
  int64_t ld, rows, keys;
  float scale;
  const float* mask;  // (rows, keys), null for none
  int64_t mask_ld;    // 0 when all rows share one
  int64_t first_query;
  bool causal;
  void* weights;  // (rows, keys up to a multiple of 16) in `dtype`, zero behind the last visible key; may be `scores`
  int64_t weights_ld;
  at::ScalarType dtype;
  float *shifts, *inverse_sums;  // (rows); 0 where no key is visible
  const Dropout& dropout;        // what it drops is zero among the weights, but not in their sums
  int64_t head;
};
void softmax_rows(const SoftmaxRows& block);

// target = factors (one a row) * products (rows, 64)
void store_scaled(const float* products, int64_t rows, int64_t columns, const float* factors, const TileTarget& target);

// out[i] = sum of a[i, :] * b[i, :], both in `dtype`
void row_dots(const void* a, int64_t a_stride, const void* b, int64_t b_stride, at::ScalarType dtype, int64_t rows,
              int64_t n, float* out);

// Keys against 64 queries: the attention weights P^T = exp(scale K Q^T + mask - shift) inverse_sum and the
// gradient of the scores, dS^T = P^T (V dO^T - delta) scale. With dropout's factors D the weights are P^T D^T, and V
// dO^T is multiplied by D^T.
struct ScoreGradTile {
  float *scores, *dweights;  // (keys, 64) each: K Q^T and V dO^T
  int64_t keys, columns;     // columns: queries up to a multiple of 16
  float scale;
  const float *shifts, *inverse_sums, *delta;  // (64); zeros where a query is missing or sees no key
  const float* mask;                           // null for none: (keys, 64), or (keys) when all queries share them
  bool mask_by_key, causal;
  int64_t first_key, first_query;
  const Dropout& dropout;
  int64_t head;
};
// In float32 the results take the place of scores and dweights. In bfloat16 they go to `weights` and `dscores`, and
// the latter once more with pairs of keys side by side; an odd last key is paired with zeros.
void score_gradients(const ScoreGradTile& tile);
void score_gradients_bf16(const ScoreGradTile& tile, c10::BFloat16* weights, c10::BFloat16* dscores,
                          c10::BFloat16* pairs);

}  // namespace fastvit::cpu
