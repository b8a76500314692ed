// Rows of heads in attention's kernels, forward and backward: TMA maps of them, swizzled tiles, and the way back.
#pragma once

#include "cuda/common.cuh"
#include "cuda/sm90/attention.h"
#include "cuda/sm90/hopper.cuh"

namespace fastvit::sm90 {

template <DType DTYPE>
using Half = std::conditional_t<DTYPE == DType::kBFloat16, __nv_bfloat16, __half>;

constexpr int kRowBytes = 128;  // of a swizzled row: 64 values
constexpr int kGroup = 128;     // threads of a warpgroup
constexpr int kAttentionThreads = 3 * kGroup;
constexpr float kLog2E = 1.4426950408889634f;

// The descriptor of a matrix in rows of 128 bytes, swizzled in patterns of 8 rows; `slice` bytes between two slices of
// 64 columns, which counts only where a product spans them.
__device__ inline uint64_t describe(uint32_t address, int slice) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kEightRows = uint64_t(8 * kRowBytes / 16) << 32;
  return kSwizzle128 | kEightRows | uint64_t(slice / 16) << 16 | uint64_t((address & 0x3ffff) >> 4);
}

// In units of descriptors: 16 bytes.
constexpr int kAlong = 16 * 2 / 16;           // 16 columns further in a row
constexpr int kAcross = 16 * kRowBytes / 16;  // 16 rows further

template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Tells the compiler that nothing is kept from before; no instruction comes of it. With values that live on through
// a loop it would let every product wait for the one before it.
template <typename Register, int N>
__device__ inline void clear(Register (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) registers[i] = 0;
}

// Four threads hold two columns each of four times 8; each gets the 8 columns of one: a transpose of 4 x 4 words.
__device__ inline void gather_columns(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t &low = words[i], &high = words[i | bit];
      const uint32_t got = hopper::shuffle_xor(upper ? low : high, bit);
      (upper ? low : high) = got;
    }
  }
}

// A product's rows times their factors, in 16 bits, at `to`, `stride` values apart. This warp's begin at `first`, and
// none is at `end` or beyond. A thread has two rows, 8 apart, and two columns of every 8: values[4 j + 2 row + column].
template <typename T, int DIM>
__device__ inline void store_rows(const float (&values)[DIM / 2], const float (&factors)[2], T* to, int64_t stride,
                                  int first, int end) {
  if (first >= end) return;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int number = first + lane / 4 + 8 * row;
    T* columns = to + number * stride + 8 * (lane % 4);
#pragma unroll
    for (int part = 0; part < (DIM / 2 + 15) / 16; ++part) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && 4 * part + i < DIM / 8; ++i) {
        const float* pair = values + 16 * part + 4 * i + 2 * row;
        words[i] = pack<T>(pair[0] * factors[row], pair[1] * factors[row]);
      }
      gather_columns(words);
      const bool inside = 32 * (part + 1) <= DIM || 32 * part + 8 * (lane % 4) < DIM;
      if (inside && number < end) store_16_bytes(columns + 32 * part, words);
    }
  }
}

// Loads of 64 columns and `rows` rows of a head. Rows past `tokens` come in as zeros, and columns past `dim`.
inline bool encode_heads(CUtensorMap& map, DType dtype, const HeadRows& t, const HeadSizes& p, int64_t tokens,
                         int rows) {
  const hopper::EncodeTiled encode = hopper::encode_tiled();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[4] = {cuuint64_t(p.dim), cuuint64_t(tokens), cuuint64_t(p.heads), cuuint64_t(p.batch)};
  // the stride of a dimension of one may be anything, but not to the driver
  const auto bytes = [](int64_t size, int64_t stride) { return cuuint64_t(size == 1 ? kRowBytes : 2 * stride); };
  const cuuint64_t strides[3] = {bytes(tokens, t.token), bytes(p.heads, t.head), bytes(p.batch, t.sample)};
  const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(&map, type, 4, t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace fastvit::sm90
