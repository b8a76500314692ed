// A row's columns in shared memory, eight a lane at a time; a warp's accesses meet no bank twice.
#pragma once

#include "cuda/common.cuh"
#include "cuda/copy_async.cuh"

namespace fastvit {

// Lane `at` of THREADS has its columns here for itself: whoever fetches them waits for nobody else.
template <typename T, int VECS, int THREADS>
struct SharedRow {
  static constexpr int kPieces = sizeof(T) / 2;  // of 16 bytes in eight columns
  uint4 pieces[VECS * kPieces][THREADS];

  __device__ void fetch(int v, int at, const T* from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      copy_async(&pieces[v * kPieces + i][at], reinterpret_cast<const uint4*>(from) + i);
    }
  }

  __device__ Packed<T, kVec> take(int v, int at) const {
    Packed<T, kVec> out;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 piece = pieces[v * kPieces + i][at];
      out.words[4 * i] = piece.x, out.words[4 * i + 1] = piece.y;
      out.words[4 * i + 2] = piece.z, out.words[4 * i + 3] = piece.w;
    }
    return out;
  }
};

// LayerNorm's weight or bias as floats, for all warps of a block.
template <int VECS>
struct SharedParam {
  SharedRow<float, VECS, kWarp> row;

  // To be followed by a barrier.
  template <typename T>
  __device__ void load(const Vector& param, int cols, float otherwise) {
    const int lane = threadIdx.x % kWarp;
    for (int v = threadIdx.x / kWarp; v < VECS; v += blockDim.x / kWarp) {
      const int col = (v * kWarp + lane) * kVec;
      if (col >= cols) continue;
      float values[kVec];
      load_param<T>(param, col, otherwise, values);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* four = values + 4 * i;
        row.pieces[2 * v + i][lane] = make_uint4(__float_as_uint(four[0]), __float_as_uint(four[1]),
                                                 __float_as_uint(four[2]), __float_as_uint(four[3]));
      }
    }
  }

  __device__ void read(int v, float (&out)[kVec]) const { unpack(row.take(v, threadIdx.x % kWarp), out); }
};

}  // namespace fastvit
