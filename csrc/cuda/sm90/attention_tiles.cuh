// What a block of attention.cuh holds in shared memory, and the warp that loads it.
#pragma once

#include "cuda/sm90/attention_rows.cuh"

namespace fastvit::sm90 {

// The next smaller number of keys that has a kernel.
constexpr int fewer_keys(int keys) {
  int found = 0;
  for (int width : kKeys) found = width < keys ? width : found;
  return found;
}

// What a block holds: for each of STAGES heads q, k and v, rows of 128 bytes, and the barriers around them.
template <int KEYS, int DIM>
struct AttentionTiles {
  static constexpr int kQueries = int(most_queries(KEYS));
  static constexpr int kSlices = (DIM + 63) / 64;  // of a tile, 64 columns each: what a row of 128 bytes holds
  static constexpr int kKeySlice = KEYS * kRowBytes, kQuerySlice = kQueries * kRowBytes;
  static constexpr int kKeyBytes = kSlices * kKeySlice;
  static constexpr int kQueryBytes = kSlices * kQuerySlice;
  static constexpr int kParts = KEYS > 256 ? 2 : 1;  // of a tile: a load, as a product, has up to 256 rows
  static constexpr int kStageBytes = kQueryBytes + 2 * kKeyBytes;
  static constexpr int kLimit = 227 * 1024 - 256;
  static constexpr int kStages = kLimit / kStageBytes < 4 ? kLimit / kStageBytes : 4;
  static constexpr int kBytes = kStages * kStageBytes + kStages * 4 * int(sizeof(hopper::Barrier));
  // Whether scores of one block and weights of another fit a thread's registers together
  static constexpr bool kTogether = KEYS / 2 + KEYS / 4 + DIM / 2 <= 188, kStoresLate = KEYS / 2 + DIM / 2 <= 160;
  static_assert(kStages >= 1 && DIM % 16 == 0 && KEYS % 16 == 0 && KEYS / kParts % 8 == 0);
};

struct AttentionParams {
  CUtensorMap q, k, v;
  void* out;
  float* lse;
  int items, shares;  // B * H * shares of its queries in each head
  int heads, queries, keys;
  int blocks;  // of queries, in a share
  float scale;
};

template <int KEYS, int DIM>
struct AttentionShared {
  using Tiles = AttentionTiles<KEYS, DIM>;
  char* const tiles = hopper::shared_memory();
  hopper::Barrier* const barriers = reinterpret_cast<hopper::Barrier*>(tiles + Tiles::kStages * Tiles::kStageBytes);

  __device__ char* q(int stage) const { return tiles + stage * Tiles::kStageBytes; }
  __device__ char* k(int stage) const { return q(stage) + Tiles::kQueryBytes; }
  __device__ char* v(int stage) const { return k(stage) + Tiles::kKeyBytes; }
  // q and k are there, v is there; both are no longer needed
  __device__ hopper::Barrier& full_scores(int stage) const { return barriers[4 * stage]; }
  __device__ hopper::Barrier& full_values(int stage) const { return barriers[4 * stage + 1]; }
  __device__ hopper::Barrier& empty_scores(int stage) const { return barriers[4 * stage + 2]; }
  __device__ hopper::Barrier& empty_values(int stage) const { return barriers[4 * stage + 3]; }
};

template <int KEYS, int DIM>
__device__ inline void load_heads(const AttentionParams& p, const AttentionShared<KEYS, DIM>& shared) {
  using Tiles = AttentionTiles<KEYS, DIM>;
  const int query_rows = p.blocks * kBlockRows / Tiles::kParts, key_rows = KEYS / Tiles::kParts;
  const auto load = [&](const CUtensorMap& map, hopper::Barrier& full, char* to, int slice_bytes, int first, int rows,
                        int head) {
#pragma unroll
    for (int i = 0; i < Tiles::kSlices * Tiles::kParts; ++i) {
      const int slice = i / Tiles::kParts, row = i % Tiles::kParts * rows;
      char* tile = to + slice * slice_bytes + row * kRowBytes;
      hopper::load_tile(map, full, tile, 64 * slice, first + row, head % p.heads, head / p.heads);
    }
  };
  int turn = 0;
  for (int item = blockIdx.x; item < p.items; item += gridDim.x, ++turn) {
    const int stage = turn % Tiles::kStages, parity = turn / Tiles::kStages % 2;
    const int head = item / p.shares, first_query = item % p.shares * p.blocks * kBlockRows;
    hopper::Barrier &scores = shared.full_scores(stage), &values = shared.full_values(stage);
    shared.empty_scores(stage).wait(parity ^ 1);
    scores.arrive_and_expect(Tiles::kSlices * p.blocks * kBlockRows * kRowBytes + Tiles::kKeyBytes);
    load(p.q, scores, shared.q(stage), Tiles::kQuerySlice, first_query, query_rows, head);
    load(p.k, scores, shared.k(stage), Tiles::kKeySlice, 0, key_rows, head);
    shared.empty_values(stage).wait(parity ^ 1);
    values.arrive_and_expect(Tiles::kKeyBytes);
    load(p.v, values, shared.v(stage), Tiles::kKeySlice, 0, key_rows, head);
  }
}

}  // namespace fastvit::sm90
