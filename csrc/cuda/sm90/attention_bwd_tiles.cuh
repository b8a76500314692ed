// What a block of attention_bwd.cuh holds in shared memory, the warp that loads it, and the warps that prepare it.
#pragma once

#include "cuda/sm90/attention_rows.cuh"

namespace fastvit::sm90 {

struct AttentionBwdParams {
  CUtensorMap q, k, v, out, dout;
  HeadRows dq, dk, dv;
  const float* lse;
  int items;  // B * H
  int heads, queries, keys;
  int blocks;  // of queries
  float scale;
};

// Places that are used in turn: the one of a turn, and the parity of its round for the place's barriers.
template <int PLACES>
struct Place {
  int at, parity;
  __device__ explicit Place(unsigned turn) : at(turn % PLACES), parity(turn / PLACES % 2) {}
};

template <int KEYS>
struct AttentionBwdTiles {
  static constexpr int kBlocks = (KEYS + 2 * kBlockRows - 1) / (2 * kBlockRows);  // of keys, of one of two warpgroups
  static constexpr int kKeyBytes = KEYS * kRowBytes, kBlockBytes = kBlockRows * kRowBytes;
  static constexpr int kHeads = KEYS > 208 ? 1 : 2;       // whose keys and values are here
  static constexpr int kRows = 3, kOuts = 2, kGrads = 2;  // blocks of q and dout, of out, and of scores' gradients
  static constexpr int kStatistics = 2 * kBlockRows * 4;  // -lse * log2(e) and delta of a block's queries
  static constexpr int kTileBytes = 2 * kHeads * kKeyBytes + (2 * kRows + kOuts) * kBlockBytes + kGrads * kKeyBytes;
  static constexpr int kBarriers = 2 * kHeads + 3 * kRows + 2 * kOuts;
  static constexpr int kBytes = kTileBytes + kRows * kStatistics + kBarriers * int(sizeof(hopper::Barrier));
  // A product reads 64 keys, past the last ones what lies behind them: it must be the block's memory
  static_assert(KEYS % 16 == 0 && KEYS <= 256 && kBytes <= 227 * 1024);
  static_assert(2 * kBlocks * kBlockRows - KEYS <= kBlockRows);
};

template <int KEYS>
struct AttentionBwdShared {
  using Tiles = AttentionBwdTiles<KEYS>;
  char* const tiles = hopper::shared_memory();

  __device__ char* k(int head) const { return tiles + 2 * head * Tiles::kKeyBytes; }
  __device__ char* v(int head) const { return k(head) + Tiles::kKeyBytes; }
  __device__ char* q(int block) const { return k(Tiles::kHeads) + 2 * block * Tiles::kBlockBytes; }
  __device__ char* dout(int block) const { return q(block) + Tiles::kBlockBytes; }
  __device__ char* out(int block) const { return q(Tiles::kRows) + block * Tiles::kBlockBytes; }
  __device__ char* grads(int block) const { return out(Tiles::kOuts) + block * Tiles::kKeyBytes; }
  __device__ float* base(int block) const {
    return reinterpret_cast<float*>(grads(Tiles::kGrads) + block * Tiles::kStatistics);
  }
  __device__ float* delta(int block) const { return base(block) + kBlockRows; }

  __device__ hopper::Barrier& barrier(int number) const {
    return reinterpret_cast<hopper::Barrier*>(base(Tiles::kRows))[number];
  }
  // keys and values are there, are no longer needed
  __device__ hopper::Barrier& full_head(int head) const { return barrier(2 * head); }
  __device__ hopper::Barrier& empty_head(int head) const { return barrier(2 * head + 1); }
  // q and dout are there, and their statistics; none of these is needed any more
  __device__ hopper::Barrier& full_rows(int block) const { return barrier(2 * Tiles::kHeads + 3 * block); }
  __device__ hopper::Barrier& full_statistics(int block) const { return barrier(2 * Tiles::kHeads + 3 * block + 1); }
  __device__ hopper::Barrier& empty_rows(int block) const { return barrier(2 * Tiles::kHeads + 3 * block + 2); }
  __device__ hopper::Barrier& full_out(int block) const {
    return barrier(2 * Tiles::kHeads + 3 * Tiles::kRows + 2 * block);
  }
  __device__ hopper::Barrier& empty_out(int block) const {
    return barrier(2 * Tiles::kHeads + 3 * Tiles::kRows + 2 * block + 1);
  }

  __device__ void init_barriers() const {
    constexpr int kWarps = kGroup / kWarp;
    for (int head = 0; head < Tiles::kHeads; ++head) full_head(head).init(1), empty_head(head).init(2 * kWarps);
    for (int block = 0; block < Tiles::kRows; ++block) {
      full_rows(block).init(1);
      full_statistics(block).init(3);
      empty_rows(block).init(2 * kWarps);
    }
    for (int block = 0; block < Tiles::kOuts; ++block) full_out(block).init(1), empty_out(block).init(2);
    hopper::show_barriers();
  }
};

// One thread: all heads of the block, and their queries 64 at a time.
template <int KEYS>
__device__ inline void load_heads(const AttentionBwdParams& p, const AttentionBwdShared<KEYS>& shared) {
  using Tiles = AttentionBwdTiles<KEYS>;
  unsigned turn = 0, turns = 0;
  for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turns) {
    const auto load = [&](const CUtensorMap& map, hopper::Barrier& full, char* to, int first) {
      hopper::load_tile(map, full, to, 0, first, item % p.heads, item / p.heads);
    };
    const Place<Tiles::kHeads> head(turns);
    shared.empty_head(head.at).wait(head.parity ^ 1);
    hopper::Barrier& full_head = shared.full_head(head.at);
    full_head.arrive_and_expect(2 * Tiles::kKeyBytes);
    load(p.k, full_head, shared.k(head.at), 0);
    load(p.v, full_head, shared.v(head.at), 0);
    for (int block = 0; block < p.blocks; ++block, ++turn) {
      const Place<Tiles::kRows> rows(turn);
      const Place<Tiles::kOuts> outs(turn);
      shared.empty_rows(rows.at).wait(rows.parity ^ 1);
      hopper::Barrier& full_rows = shared.full_rows(rows.at);
      full_rows.arrive_and_expect(2 * Tiles::kBlockBytes);
      load(p.q, full_rows, shared.q(rows.at), block * kBlockRows);
      load(p.dout, full_rows, shared.dout(rows.at), block * kBlockRows);
      shared.empty_out(outs.at).wait(outs.parity ^ 1);
      hopper::Barrier& full_out = shared.full_out(outs.at);
      full_out.arrive_and_expect(Tiles::kBlockBytes);
      load(p.out, full_out, shared.out(outs.at), block * kBlockRows);
    }
  }
}

// Of 4 values each.
template <typename T>
__device__ inline float dot(const char* a, const char* b) {
  const uint2 left = *reinterpret_cast<const uint2*>(a), right = *reinterpret_cast<const uint2*>(b);
  float x[4], y[4], sum = 0.f;
  unpack(Packed<T, 4>{left.x, left.y}, x);
  unpack(Packed<T, 4>{right.x, right.y}, y);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// One warp: what takes scores to weights, for each query. One past the last gets -inf, so that its weights are zeros.
template <int KEYS>
__device__ inline void prepare_base(const AttentionBwdParams& p, const AttentionBwdShared<KEYS>& shared) {
  using Tiles = AttentionBwdTiles<KEYS>;
  const int lane = threadIdx.x % kWarp;
  unsigned turn = 0;
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    for (int block = 0; block < p.blocks; ++block, ++turn) {
      const Place<Tiles::kRows> rows(turn);
      shared.empty_rows(rows.at).wait(rows.parity ^ 1);
#pragma unroll
      for (int row = lane; row < kBlockRows; row += kWarp) {
        const int query = block * kBlockRows + row;
        const float lse = query < p.queries ? p.lse[int64_t(item) * p.queries + query] : INFINITY;
        shared.base(rows.at)[row] = -lse * kLog2E;
      }
      hopper::sync_warp();
      if (lane == 0) shared.full_statistics(rows.at).arrive();
    }
  }
}

// Two warps: delta = sum(dout * out) of each query. Short of registers: these warps have given theirs away.
template <DType DTYPE, int KEYS>
__device__ inline void prepare_delta(const AttentionBwdParams& p, const AttentionBwdShared<KEYS>& shared, int warp) {
  using T = Half<DTYPE>;
  using Tiles = AttentionBwdTiles<KEYS>;
  const int lane = threadIdx.x % kWarp;
  const unsigned turns = (p.items - blockIdx.x + gridDim.x - 1) / gridDim.x * p.blocks;
  for (unsigned turn = 0; turn < turns; ++turn) {
    const Place<Tiles::kRows> rows(turn);
    const Place<Tiles::kOuts> outs(turn);
    shared.full_rows(rows.at).wait(rows.parity);
    shared.full_out(outs.at).wait(outs.parity);
    const int first = warp * kBlockRows / 2;
    const char* dout = shared.dout(rows.at) + first * kRowBytes + lane * 8;
    const char* out = shared.out(outs.at) + first * kRowBytes + lane * 8;
    float* delta = shared.delta(rows.at) + first + lane / 16;
#pragma unroll 1
    for (int row = 0; row < kBlockRows / 2; row += 2) {  // by 16 threads each, in the order they lie swizzled
      float sum = dot<T>(dout + row * kRowBytes, out + row * kRowBytes);
#pragma unroll
      for (int bit = 1; bit < 16; bit *= 2) sum += hopper::shuffle_xor(sum, bit);
      if (lane % 16 == 0) delta[row] = sum;
    }
    hopper::sync_warp();
    if (lane == 0) {
      shared.full_statistics(rows.at).arrive();
      shared.empty_out(outs.at).arrive();
    }
  }
}

}  // namespace fastvit::sm90
