// softmax(scale q k^T) v of heads whose keys all stay on the chip, forward, on TMA and wgmma.
//
// A block stays on its multiprocessor and takes a head after the other. One warp loads: q, k and v of a head, as many
// heads ahead as shared memory holds. Two warpgroups multiply: they take turns, 64 queries at a time, so that one is at
// its exponentials while the other keeps the tensor cores busy. All scores of 64 queries are in registers at once: the
// row maximum is exact, nothing is rescaled, and the weights go into the second product as they are.
//
// The arithmetic is that of the Triton kernel whose backward takes over (kernels/attention.py).
#pragma once

#include "cuda/sm90/attention_tiles.cuh"

namespace fastvit::sm90 {

// A warpgroup's share of a block's work: every other block of queries, counted through all of its heads.
template <DType DTYPE, int KEYS, int DIM>
struct AttentionGroup {
  using T = Half<DTYPE>;
  using Tiles = AttentionTiles<KEYS, DIM>;
  static constexpr int kScores = KEYS / 2, kWeights = KEYS / 4, kOut = DIM / 2;  // registers of a thread

  struct Place {
    int item;
    int turn, block;  // the item's number in this block, the queries' number in the item
    __device__ int stage() const { return turn % Tiles::kStages; }
    __device__ int parity() const { return turn / Tiles::kStages % 2; }
  };

  const AttentionParams& p;
  const AttentionShared<KEYS, DIM> shared;
  const int group, thread;  // 0 or 1; 0 to 127
  int mine, others;         // how often each of the two gets its turn

  __device__ AttentionGroup(const AttentionParams& params, const AttentionShared<KEYS, DIM>& memory, int number)
      : p(params), shared(memory), group(number), thread(threadIdx.x % kGroup) {
    const int items = (p.items - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    const int all = items * p.blocks, first = (all + apart() - 1) / apart(), second = all - first;
    // one turn more than blocks: the last one's second product
    mine = (group == 0 ? first : second) + 1;
    others = (group == 0 ? second : first) + 1;
  }

  // Every other block is a group's, but for heads of one block in a single stage. There one group takes them all: who
  // waits for a barrier's phase before the phase before it has ended is told too early, by parity, that its own has.
  // With three stages, a group's turn comes after the other has waited for what lay in its stage before.
  __device__ int apart() const { return Tiles::kStages == 1 && p.blocks == 1 ? 1 : 2; }

  __device__ bool has_work() const { return mine > 1; }
  __device__ int lane() const { return thread % kWarp; }
  __device__ int head(const Place& at) const { return at.item / p.shares; }
  __device__ int first_row(const Place& at) const {
    return kBlockRows * (at.item % p.shares * p.blocks + at.block) + thread / kWarp * 16;
  }

  __device__ void step(Place& at, int by) const {
    for (at.block += by; at.block >= p.blocks; at.block -= p.blocks) at.item += gridDim.x, ++at.turn;
  }
  __device__ bool is_last_of_item(const Place& at) const { return at.block + apart() >= p.blocks; }

  // The tensor cores are given from one group to the other: 0, 1, 0, 1, ... A group without work has no turns.
  __device__ void turn_begin(int turn) const {
    const bool waits = group == 1 || (turn > 0 && others > 1 && turn <= others);
    if (waits) hopper::named_sync(group, 2 * kGroup);
  }
  __device__ void turn_end(int turn) const {
    const bool goes_on = others > 1 && (group == 0 ? turn < others : turn + 1 < others);
    if (goes_on) hopper::named_arrive(1 - group, 2 * kGroup);
  }

  __device__ void release(hopper::Barrier& empty) const {
    hopper::sync_warp();
    if (lane() == 0) empty.arrive();
  }

  __device__ void begin_scores(float (&scores)[kScores], const Place& at) const {
    const uint64_t q =
        describe(hopper::shared_address(shared.q(at.stage())) + at.block * kBlockRows * kRowBytes, Tiles::kQuerySlice);
    const uint64_t k = describe(hopper::shared_address(shared.k(at.stage())), Tiles::kKeySlice);
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step) {
      const int slice = step / 4, along = kAlong * (step % 4);
      const uint64_t of_q = q + slice * Tiles::kQuerySlice / 16 + along,
                     of_k = k + slice * Tiles::kKeySlice / 16 + along;
      constexpr int kFirst = KEYS < 256 ? KEYS : 256;
      hopper::multiply<T, kFirst>(scores, of_q, of_k, step > 0);
      if constexpr (KEYS > kFirst) {
        const uint64_t rest = of_k + kFirst * kRowBytes / 16;
        hopper::multiply<T, KEYS - kFirst>(scores + kFirst / 2, of_q, rest, step > 0);
      }
    }
    hopper::products_commit();
  }

  __device__ void begin_out(float (&out)[kOut], const uint32_t (&weights)[kWeights], const Place& at) const {
    const uint64_t v = describe(hopper::shared_address(shared.v(at.stage())), Tiles::kKeySlice);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      hopper::multiply<T, DIM>(out, weights + 4 * step, v + kAcross * step, step > 0);
    }
    hopper::products_commit();
  }

  // A thread has two rows, 8 apart, and two neighbouring columns of every 8: scores[4 j + 2 row + column].
  __device__ void find_maxima(float (&scores)[kScores], float (&maxima)[2]) const {
    const int left = p.keys - 2 * (thread % 4);
#pragma unroll
    for (int i = fewer_keys(KEYS) / 2; i < kScores; ++i) {
      if (8 * (i / 4) + i % 2 >= left) scores[i] = -INFINITY;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float even = scores[2 * row], odd = scores[2 * row + 1];
#pragma unroll
      for (int i = 4; i < kScores; i += 4) {
        even = fmaxf(even, scores[i + 2 * row]);
        odd = fmaxf(odd, scores[i + 2 * row + 1]);
      }
      maxima[row] = fmaxf(even, odd);
      maxima[row] = fmaxf(maxima[row], hopper::shuffle_xor(maxima[row], 1));
      maxima[row] = fmaxf(maxima[row], hopper::shuffle_xor(maxima[row], 2));
    }
  }

  // Scores become weights, in the form of the second product's operand; `inverse` what is left to divide by.
  __device__ void weigh(const float (&scores)[kScores], const float (&maxima)[2], uint32_t (&weights)[kWeights],
                        float (&inverse)[2], const Place& at) const {
    constexpr float kLn2 = 0.6931471805599453f;
    if (first_row(at) >= p.queries) {  // none of the warp's rows is stored
      clear(weights);
      return;
    }
    const float factor = p.scale * kLog2E;
    const float base[2] = {maxima[0] * factor, maxima[1] * factor};
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int row = i % 2;
      const float low = hopper::exp2(fmaf(scores[2 * i], factor, -base[row]));
      const float high = hopper::exp2(fmaf(scores[2 * i + 1], factor, -base[row]));
      sums[2 * row] += low, sums[2 * row + 1] += high;
      weights[i] = pack<T>(low, high);
    }
    float* lse = p.lse + int64_t(head(at)) * p.queries;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = sums[2 * row] + sums[2 * row + 1];
      sum += hopper::shuffle_xor(sum, 1);
      sum += hopper::shuffle_xor(sum, 2);
      inverse[row] = __fdividef(1.f, sum);
      const int query = first_row(at) + lane() / 4 + 8 * row;
      if (thread % 4 == 0 && query < p.queries) lse[query] = fmaf(maxima[row], p.scale, hopper::log2(sum) * kLn2);
    }
  }

  __device__ void store_out(const float (&out)[kOut], const float (&inverse)[2], const Place& at) const {
    const int sample = head(at) / p.heads, of_sample = head(at) % p.heads;
    T* rows = static_cast<T*>(p.out) + (int64_t(sample) * p.queries * p.heads + of_sample) * DIM;
    store_rows<T, DIM>(out, inverse, rows, int64_t(p.heads) * DIM, first_row(at), p.queries);
  }

  __device__ void run() const {
    float scores[kScores], out[kOut], maxima[2], inverse[2] = {};
    uint32_t weights[kWeights];
    Place at{int(blockIdx.x), 0, 0};
    step(at, group);

    shared.full_scores(at.stage()).wait(at.parity());
    turn_begin(0);
    clear(scores);
    hopper::products_begin();
    begin_scores(scores, at);
    turn_end(0);
    hopper::products_wait<0>();
    hopper::pin(scores);
    if (is_last_of_item(at)) release(shared.empty_scores(at.stage()));
    find_maxima(scores, maxima);
    weigh(scores, maxima, weights, inverse, at);

    for (int turn = 1; turn < mine - 1; ++turn) {
      Place next = at;
      step(next, apart());
      shared.full_scores(next.stage()).wait(next.parity());
      shared.full_values(at.stage()).wait(at.parity());
      turn_begin(turn);
      clear(scores);
      clear(out);
      hopper::products_begin();
      if constexpr (Tiles::kTogether) {  // maxima are found while the second product still runs
        begin_scores(scores, next);
        begin_out(out, weights, at);
        turn_end(turn);
        hopper::products_wait<1>();
        hopper::pin(scores);
        find_maxima(scores, maxima);
        hopper::products_wait<0>();
        hopper::pin(out);
        store_out(out, inverse, at);
      } else {  // the results are stored while the scores are multiplied, where registers are left for both
        begin_out(out, weights, at);
        hopper::products_wait<0>();
        hopper::pin(out);
        if constexpr (!Tiles::kStoresLate) store_out(out, inverse, at);
        hopper::products_begin();
        begin_scores(scores, next);
        turn_end(turn);
        if constexpr (Tiles::kStoresLate) store_out(out, inverse, at);
        hopper::products_wait<0>();
        hopper::pin(scores);
        find_maxima(scores, maxima);
      }
      if (is_last_of_item(next)) release(shared.empty_scores(next.stage()));
      if (is_last_of_item(at)) release(shared.empty_values(at.stage()));
      weigh(scores, maxima, weights, inverse, next);
      at = next;
    }

    shared.full_values(at.stage()).wait(at.parity());
    turn_begin(mine - 1);
    clear(out);
    hopper::products_begin();
    begin_out(out, weights, at);
    turn_end(mine - 1);
    hopper::products_wait<0>();
    hopper::pin(out);
    store_out(out, inverse, at);
  }
};

// SHARED is for benchmarks/aot_cuda.py to see.
template <DType DTYPE, int KEYS, int DIM, int SHARED>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_fwd_kernel(const __grid_constant__ AttentionParams p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tiles = AttentionTiles<KEYS, DIM>;
  const AttentionShared<KEYS, DIM> shared;
  if (threadIdx.x == 0) {
    const int users = min(p.blocks, 2) * (kGroup / kWarp);  // warps that give a stage back
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      shared.full_scores(stage).init(1);
      shared.full_values(stage).init(1);
      shared.empty_scores(stage).init(users);
      shared.empty_values(stage).init(users);
    }
    hopper::show_barriers();
  }
  hopper::sync_block();
  const int part = threadIdx.x / kGroup;
  if (part == 0) {
    hopper::give_registers<24>();
    if (threadIdx.x == 0) {
      hopper::prefetch_map(p.q);
      hopper::prefetch_map(p.k);
      hopper::prefetch_map(p.v);
      await_previous();
      load_heads(p, shared);
      allow_next();
    }
  } else {
    hopper::take_registers<240>();
    const AttentionGroup<DTYPE, KEYS, DIM> group(p, shared, part - 1);
    if (group.has_work()) group.run();
  }
#endif
}

// With few heads a block takes two blocks of queries, one a warpgroup, where there is room for all at once.
inline int shares_of_head(int64_t all_heads, int64_t blocks, int64_t multiprocessors) {
  const int64_t shares = ceil_div(blocks, 2);
  return all_heads * shares <= multiprocessors ? int(shares) : 1;
}

template <DType DTYPE, int KEYS, int DIM>
cudaError_t launch_attention_fwd(const AttentionFwd& p, cudaStream_t stream) {
  using Tiles = AttentionTiles<KEYS, DIM>;
  if (p.queries > Tiles::kQueries) return cudaErrorInvalidValue;
  AttentionParams params{};
  params.out = p.out;
  params.lse = p.lse;
  const int all_heads = int(p.batch * p.heads), blocks = int(ceil_div(p.queries, kBlockRows));
  const int most = multiprocessors(p.device);
  params.shares = shares_of_head(all_heads, blocks, most);
  params.blocks = int(ceil_div(blocks, params.shares));
  params.items = all_heads * params.shares;
  params.heads = int(p.heads), params.queries = int(p.queries), params.keys = int(p.keys);
  params.scale = p.scale;
  const bool known = encode_heads(params.q, DTYPE, p.q, p, p.queries, params.blocks * kBlockRows / Tiles::kParts) &&
                     encode_heads(params.k, DTYPE, p.k, p, p.keys, KEYS / Tiles::kParts) &&
                     encode_heads(params.v, DTYPE, p.v, p, p.keys, KEYS / Tiles::kParts);
  if (!known) return cudaErrorInvalidValue;
  return hopper::launch(&attention_fwd_kernel<DTYPE, KEYS, DIM, Tiles::kBytes>, std::min(params.items, most),
                        kAttentionThreads, Tiles::kBytes, params, stream);
}

template <DType DTYPE, int INDEX = 0>
cudaError_t launch_attention_fwd_of(const AttentionFwd& p, cudaStream_t stream) {
  if constexpr (INDEX == kWidths) {
    return cudaErrorInvalidValue;
  } else {
    if (p.keys > kKeys[INDEX]) return launch_attention_fwd_of<DTYPE, INDEX + 1>(p, stream);
    if (p.dim == kHeadDims[0]) return launch_attention_fwd<DTYPE, kKeys[INDEX], kHeadDims[0]>(p, stream);
    if (p.dim == kHeadDims[1]) return launch_attention_fwd<DTYPE, kKeys[INDEX], kHeadDims[1]>(p, stream);
    return cudaErrorInvalidValue;
  }
}

}  // namespace fastvit::sm90
