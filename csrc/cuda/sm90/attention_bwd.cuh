// dq, dk and dv of softmax(scale q k^T) v, for heads whose keys all stay on the chip, on TMA and wgmma.
//
// A block takes a head after the other; its queries stream through in blocks of 64. Two warpgroups own half of the keys
// each, as rows of s^T = k q^T: dk and dv are summed in registers, in one order, and weights and gradients of scores go
// from registers into the products that need them. dq = ds k needs the gradients of all keys: both groups leave
// theirs in shared memory, and one of them multiplies, in turn. One warp loads ahead, two others sum delta.
#pragma once

#include "cuda/sm90/attention_bwd_tiles.cuh"

namespace fastvit::sm90 {

template <DType DTYPE, int KEYS>
struct AttentionBwdGroup {
  using T = Half<DTYPE>;
  using Tiles = AttentionBwdTiles<KEYS>;
  static constexpr int kSums = kBwdDim / 2, kScores = kBlockRows / 2, kWords = kScores / 2;  // registers of a thread
  static constexpr int kSteps = kBwdDim / 16;

  const AttentionBwdParams& p;
  const AttentionBwdShared<KEYS> shared;
  const int group, thread;  // 0 or 1; 0 to 127

  __device__ AttentionBwdGroup(const AttentionBwdParams& params, const AttentionBwdShared<KEYS>& memory, int number)
      : p(params), shared(memory), group(number), thread(threadIdx.x % kGroup) {}

  __device__ int item_of(unsigned heads) const { return blockIdx.x + heads * gridDim.x; }
  __device__ int lane() const { return thread % kWarp; }
  __device__ int warp_row() const { return thread / kWarp * 16; }
  __device__ int first_key(int part) const { return (group * Tiles::kBlocks + part) * kBlockRows; }  // of the group's

  __device__ void release(hopper::Barrier& empty) const {
    hopper::sync_warp();
    if (lane() == 0) empty.arrive();
  }

  // 64 keys or values times 64 queries' q or dout, over the head's columns
  __device__ void begin_scores(float (&scores)[kScores], const char* keys, const char* rows) const {
    const uint64_t a = describe(hopper::shared_address(keys), 0), b = describe(hopper::shared_address(rows), 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      hopper::multiply<T, kBlockRows>(scores, a + kAlong * step, b + kAlong * step, step > 0);
    }
    hopper::products_commit();
  }

  // Adds 64 keys' weights, or gradients of scores, times 64 queries' dout or q, over the queries
  __device__ void begin_sums(float (&sums)[kSums], const uint32_t (&words)[kWords], const char* rows) const {
    const uint64_t b = describe(hopper::shared_address(rows), 0);
#pragma unroll
    for (int step = 0; step < kBlockRows / 16; ++step) {
      hopper::multiply<T, kBwdDim>(sums, words + 4 * step, b + kAcross * step, true);
    }
    hopper::products_commit();
  }

  // 64 queries' gradients of scores times k, over all keys
  __device__ void begin_dq(float (&dq)[kSums], const char* grads, const char* keys) const {
    const uint64_t a = describe(hopper::shared_address(grads), 0), b = describe(hopper::shared_address(keys), 0);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      hopper::multiply_across<T, kBwdDim>(dq, a + kAcross * step, b + kAcross * step, step > 0);
    }
    hopper::products_commit();
  }

  // Scores and gradients of weights become weights and gradients of scores, in the form of a product's left operand.
  // A thread has two keys, 8 apart, and two neighbouring queries of every 8: scores[4 j + 2 key + query].
  __device__ void weigh(const float (&scores)[kScores], const float (&dweights)[kScores], uint32_t (&weights)[kWords],
                        uint32_t (&dscores)[kWords], int rows) const {
    const float factor = p.scale * kLog2E;
    const float2* base = reinterpret_cast<const float2*>(shared.base(rows)) + thread % 4;
    const float2* delta = reinterpret_cast<const float2*>(shared.delta(rows)) + thread % 4;
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      const float2 b = base[i], d = delta[i];
#pragma unroll
      for (int key = 0; key < 2; ++key) {
        const int at = i + 2 * key;
        const float low = hopper::exp2(fmaf(scores[at], factor, b.x));
        const float high = hopper::exp2(fmaf(scores[at + 1], factor, b.y));
        weights[at / 2] = pack<T>(low, high);
        dscores[at / 2] = pack<T>(low * (dweights[at] - d.x), high * (dweights[at + 1] - d.y));
      }
    }
  }

  // Keys past the last have no gradients of scores, whatever their weights would be.
  __device__ void leave_out_missing_keys(uint32_t (&words)[kWords], int first) const {
    if (first + 16 <= p.keys) return;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (first + lane() / 4 + i % 2 * 8 >= p.keys) words[i] = 0;
    }
  }

  // As rows of keys, 64 queries each, swizzled: what begin_dq reads across.
  __device__ void store_grads(const uint32_t (&words)[kWords], char* grads, int first) const {
    if (first >= KEYS) return;
    const int row = lane() % 16, half = lane() / 16;
    char* to = grads + (first + row) * kRowBytes;
#pragma unroll
    for (int step = 0; step < kWords / 4; ++step) {
      hopper::store_matrices(to + ((2 * step + half) ^ row % 8) * 16, words + 4 * step);
    }
  }

  // What products still use after add_rows
  struct Sums {
    float dk[Tiles::kBlocks][kSums], dv[Tiles::kBlocks][kSums];
    uint32_t weights[kWords], dscores[kWords];
  };

  __device__ static void finish(Sums& sums, int part) {
    hopper::products_wait<0>();
    hopper::pin(sums.dv[part]);
    hopper::pin(sums.dk[part]);
  }

  // 64 queries against this group's keys. Ends while the last sums still run.
  __device__ void add_rows(Sums& sums, int head, int rows, char* grads) const {
    float scores[kScores], dweights[kScores];
#pragma unroll
    for (int part = 0; part < Tiles::kBlocks; ++part) {
      const int first = first_key(part), of_warp = first + warp_row();
      clear(scores);
      clear(dweights);
      hopper::products_begin();
      begin_scores(scores, shared.k(head) + first * kRowBytes, shared.q(rows));
      begin_scores(dweights, shared.v(head) + first * kRowBytes, shared.dout(rows));
      hopper::products_wait<0>();
      hopper::pin(scores);
      hopper::pin(dweights);
      weigh(scores, dweights, sums.weights, sums.dscores, rows);
      leave_out_missing_keys(sums.dscores, of_warp);
      hopper::pin(sums.dv[part]);
      hopper::pin(sums.dk[part]);
      hopper::products_begin();
      begin_sums(sums.dv[part], sums.weights, shared.dout(rows));
      store_grads(sums.dscores, grads, of_warp);  // while no product has them: then they may not even be read
      hopper::products_begin();
      begin_sums(sums.dk[part], sums.dscores, shared.q(rows));
      if (part + 1 < Tiles::kBlocks) finish(sums, part);
    }
    hopper::show_writes();
  }

  __device__ void multiply_dq(const char* grads, int head, int item, int first_query) const {
    float dq[kSums];
    clear(dq);
    hopper::products_begin();
    begin_dq(dq, grads, shared.k(head));
    hopper::products_wait<0>();
    hopper::named_sync(2 + group, kGroup);  // no warp writes the next gradients here while another still multiplies
    hopper::pin(dq);
    store(dq, p.dq, p.scale, item, first_query + warp_row(), p.queries);
  }

  __device__ void store(const float (&values)[kSums], const HeadRows& t, float factor, int item, int first,
                        int end) const {
    T* rows = static_cast<T*>(t.data) + item / p.heads * t.sample + item % p.heads * t.head;
    const float factors[2] = {factor, factor};
    store_rows<T, kBwdDim>(values, factors, rows, t.token, first, end);
  }

  __device__ void run() const {
    unsigned turn = 0;
    for (unsigned heads = 0; item_of(heads) < p.items; ++heads) {
      const Place<Tiles::kHeads> head(heads);
      Sums sums;
#pragma unroll
      for (int part = 0; part < Tiles::kBlocks; ++part) clear(sums.dk[part]), clear(sums.dv[part]);
      shared.full_head(head.at).wait(head.parity);
      for (; turn < (heads + 1) * p.blocks; ++turn) {
        const Place<Tiles::kRows> rows(turn);
        const int grads = turn % 2;  // and who multiplies for dq
        shared.full_rows(rows.at).wait(rows.parity);
        shared.full_statistics(rows.at).wait(rows.parity);
        add_rows(sums, head.at, rows.at, shared.grads(grads));
        if (grads == group) {
          hopper::named_sync(grads, 2 * kGroup);
          multiply_dq(shared.grads(grads), head.at, item_of(heads), (turn - heads * p.blocks) * kBlockRows);
        } else {
          hopper::named_arrive(grads, 2 * kGroup);
        }
#pragma unroll
        for (int part = 0; part < Tiles::kBlocks; ++part) finish(sums, part);
        release(shared.empty_rows(rows.at));
      }
      release(shared.empty_head(head.at));
#pragma unroll
      for (int part = 0; part < Tiles::kBlocks; ++part) {
        const int first = first_key(part) + warp_row();
        store(sums.dk[part], p.dk, p.scale, item_of(heads), first, p.keys);
        store(sums.dv[part], p.dv, 1.f, item_of(heads), first, p.keys);
      }
    }
  }
};

// SHARED is for benchmarks/aot_cuda.py to see.
template <DType DTYPE, int KEYS, int SHARED>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_bwd_kernel(const __grid_constant__ AttentionBwdParams p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const AttentionBwdShared<KEYS> shared;
  if (threadIdx.x == 0) shared.init_barriers();
  hopper::sync_block();
  const int part = threadIdx.x / kGroup, warp = threadIdx.x / kWarp;
  if (part == 0) {
    hopper::give_registers<24>();
    if (threadIdx.x == 0) {
      await_previous();
      load_heads(p, shared);
      allow_next();
    } else if (warp == 1) {
      await_previous();
      prepare_base(p, shared);
    } else if (warp > 1) {
      prepare_delta<DTYPE>(p, shared, warp - 2);
    }
  } else {
    hopper::take_registers<240>();
    AttentionBwdGroup<DTYPE, KEYS>(p, shared, part - 1).run();
  }
#endif
}

template <DType DTYPE, int KEYS>
cudaError_t launch_attention_bwd(const AttentionBwd& p, cudaStream_t stream) {
  using Tiles = AttentionBwdTiles<KEYS>;
  AttentionBwdParams params{};
  params.dq = p.dq, params.dk = p.dk, params.dv = p.dv;
  params.lse = p.lse;
  params.items = int(p.batch * p.heads), params.heads = int(p.heads);
  params.queries = int(p.queries), params.keys = int(p.keys);
  params.blocks = int(ceil_div(p.queries, kBlockRows));
  params.scale = p.scale;
  const bool known = encode_heads(params.q, DTYPE, p.q, p, p.queries, kBlockRows) &&
                     encode_heads(params.k, DTYPE, p.k, p, p.keys, KEYS) &&
                     encode_heads(params.v, DTYPE, p.v, p, p.keys, KEYS) &&
                     encode_heads(params.out, DTYPE, p.out, p, p.queries, kBlockRows) &&
                     encode_heads(params.dout, DTYPE, p.dout, p, p.queries, kBlockRows);
  if (!known) return cudaErrorInvalidValue;
  return hopper::launch(&attention_bwd_kernel<DTYPE, KEYS, Tiles::kBytes>,
                        std::min(params.items, multiprocessors(p.device)), kAttentionThreads, Tiles::kBytes, params,
                        stream);
}

template <DType DTYPE, int INDEX = 0>
cudaError_t launch_attention_bwd_of(const AttentionBwd& p, cudaStream_t stream) {
  if constexpr (INDEX == kBwdWidths) {
    return cudaErrorInvalidValue;
  } else {
    if (p.keys > kBwdKeys[INDEX]) return launch_attention_bwd_of<DTYPE, INDEX + 1>(p, stream);
    return launch_attention_bwd<DTYPE, kBwdKeys[INDEX]>(p, stream);
  }
}

}  // namespace fastvit::sm90
