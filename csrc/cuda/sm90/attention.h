// The bridge between glue (attention.cpp) and Hopper's attention (attention_*.cu): plain pointers, strides, a stream.
#pragma once

#include "layernorm_mlp.h"

namespace fastvit::sm90 {

constexpr int kHeadDims[] = {64, 80};
constexpr int kBlockRows = 64;  // queries of a product

// Numbers of keys that have a kernel: all keys of a head stay on the chip, and scores are computed for all of these
// columns. They follow the lengths of ViTs.
constexpr int kKeys[] = {64, 80, 128, 160, 192, 208, 256, 272};
constexpr int kWidths = int(sizeof(kKeys) / sizeof(kKeys[0]));
constexpr int kMostKeys = kKeys[kWidths - 1];

constexpr int64_t most_queries(int64_t keys) { return (keys + kBlockRows - 1) / kBlockRows * kBlockRows; }

// A (B, H, N, D) tensor in 16 bits: D values side by side, and how many values apart tokens, heads and samples are.
// All start at multiples of 16 bytes.
struct HeadRows {
  void* data;
  int64_t token, head, sample;
};

struct HeadSizes {
  int64_t batch, heads, queries, keys, dim;
};

// out = softmax(scale q k^T) v, lse = log(sum(exp(scale q k^T))) with 1 to kMostKeys keys, 1 to most_queries(keys)
// queries, fewer than 2^31 heads in all, and a head dim of kHeadDims
struct AttentionFwd : HeadSizes {
  HeadRows q, k, v;
  void* out;   // (B, Nq, H, D) contiguous
  float* lse;  // (B, H, Nq)
  float scale;
  int device;
};
template <DType DTYPE>
cudaError_t launch_attention_fwd(const AttentionFwd& p, cudaStream_t stream);

// Numbers of keys that have a backward, all for one head dim
constexpr int kBwdKeys[] = {128, 208, 256};
constexpr int kBwdWidths = int(sizeof(kBwdKeys) / sizeof(kBwdKeys[0]));
constexpr int kMostBwdKeys = kBwdKeys[kBwdWidths - 1];
constexpr int kBwdDim = 64;
constexpr int64_t kMostBwdQueries = int64_t(1) << 30;

// dq, dk and dv of what AttentionFwd computes, from its out and lse: 1 to kMostBwdKeys keys,
// 1 to kMostBwdQueries queries, fewer than 2^31 heads in all
struct AttentionBwd : HeadSizes {
  HeadRows q, k, v, out, dout, dq, dk, dv;
  const float* lse;  // (B, H, Nq)
  float scale;
  int device;
};
template <DType DTYPE>
cudaError_t launch_attention_bwd(const AttentionBwd& p, cudaStream_t stream);

}  // namespace fastvit::sm90
