// q and k on their way into attention, normalised over the head dim and then rotated by their position, and the way
// back of their gradients. In float32, rounded once. Meaning: fastvit.reference.prepare_heads.
#pragma once

#include <string>

#include "../common.h"
#include "parallel.h"

namespace fastvit::cpu {

enum class HeadNorm { none, layer, rms };

// Some rows of one head.
struct HeadRowsIn {
  const void* rows;
  int64_t stride;
  at::ScalarType dtype;
  int64_t count, dim;
  HeadNorm norm;
  float eps;
  const float *weight, *bias;  // (dim, padded)
  const float* angles;         // (count - unrotated, 2 * dim): sines, then cosines; null for no rotation
  int64_t angles_stride, unrotated;
  bool half;      // column c turns with c + dim / 2, else 2 i with 2 i + 1
  float* buffer;  // HEAD_BUFFERS * (dim, padded)
};
constexpr int64_t HEAD_BUFFERS = 2;

void prepare_heads(const HeadRowsIn& in, void* out, int64_t ld, at::ScalarType dtype);

// From the gradients of what `prepare_heads` gives to those of what it was given.
struct HeadGradRows {
  const float* grads;
  int64_t ld;
  void* out;  // in the dtype of the rows
  int64_t stride;
  float *dweight, *dbias;  // (dim, padded) to add to; null without a norm
};
void prepare_heads_backward(const HeadRowsIn& in, const HeadGradRows& grads);

// What happens to the rows of q, or of k.
struct Preparation {
  HeadNorm norm = HeadNorm::none;
  float eps = 0.0f;
  Tensor weight, bias;  // (D, padded) float32
  Tensor table;         // (1 or B, 1 or H, L, 2 * D) float32; undefined for no rotation
  int64_t num_prefix = 0;
  bool half = false;

  bool given() const { return norm != HeadNorm::none || table.defined(); }
};

// q_norm, k_norm and rope as a schema holds them; fastvit/ops/_heads.py.
struct HeadOptions {
  const OptionalTensor &q_weight, &q_bias, &k_weight, &k_bias;
  const std::string& norm;
  double q_eps, k_eps;
  const OptionalTensor& rope;
  int64_t num_prefix;
  bool half;
};
struct Preparations {
  Preparation q, k;
};
Preparations preparations(const HeadOptions& options, const Tensor& q, const Tensor& k);

// Sums of the gradients of a norm's weight and bias, (2, D), over the rows of all heads: each head's for itself, so
// that they do not depend on the threads, then in order.
class NormGradSums {
 public:
  NormGradSums(bool wanted, int64_t heads, int64_t dim);
  double* head(int64_t index) const { return totals_.defined() ? values_ + index * 2 * padded_ : nullptr; }
  Tensor result() const;  // float32; (2, 0) when not wanted

 private:
  Tensor totals_;
  double* values_ = nullptr;
  int64_t heads_, dim_, padded_;
};

}  // namespace fastvit::cpu
