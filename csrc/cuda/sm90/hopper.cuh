// The instructions of Hopper that a kernel here writes out itself: TMA loads, mbarriers, wgmma, barriers by name.
// One thin layer, so that the same kernel runs in tests without a GPU on a second one (tests/hopper_on_cpu.h).
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "cuda/common.cuh"

namespace fastvit::sm90::hopper {

// Starts at a multiple of 1024 bytes, as the swizzle's pattern does.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
__device__ inline uint32_t shared_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }

__device__ inline void sync_block() { __syncthreads(); }

template <typename T>
__device__ inline T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
__device__ inline void sync_warp() { __syncwarp(); }

__device__ inline float exp2(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}
__device__ inline float log2(float v) { return __log2f(v); }

// An mbarrier: a phase ends once `count` threads have arrived and all expected bytes are there.
struct Barrier {
  uint64_t word;
  __device__ void init(int count) { cutlass::arch::ClusterBarrier::init(&word, count); }
  __device__ void arrive() { cutlass::arch::ClusterBarrier::arrive(&word); }
  __device__ void arrive_and_expect(uint32_t bytes) {
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&word, bytes);
  }
  // Returns once the phase of this parity has ended; of a fresh barrier's two, 1 has.
  __device__ void wait(uint32_t parity) { cutlass::arch::ClusterBarrier::wait(&word, parity); }
};
__device__ inline void show_barriers() { cutlass::arch::fence_barrier_init(); }  // after init, to TMA

// A warpgroup of 128 waits for another, or lets it go on.
__device__ inline void named_sync(int name, int threads) { cutlass::arch::NamedBarrier::sync(threads, name); }
__device__ inline void named_arrive(int name, int threads) { cutlass::arch::NamedBarrier::arrive(threads, name); }

template <int COUNT>
__device__ inline void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<COUNT>();
}
template <int COUNT>
__device__ inline void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<COUNT>();
}

// One thread loads the map's box at these coordinates; `full` gets the bytes of the whole box.
__device__ inline void load_tile(const CUtensorMap& map, Barrier& full, void* to, int c0, int c1, int c2, int c3) {
  constexpr auto kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_4D::copy(&map, &full.word, kHint, to, c0, c1, c2, c3);
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}

// Products are asynchronous: what they read and write must be left alone until a wait.
__device__ inline void products_begin() { cute::warpgroup_arrive(); }
__device__ inline void products_commit() { cute::warpgroup_commit_batch(); }
template <int LATEST>  // these groups may still run
__device__ inline void products_wait() {
  cute::warpgroup_wait<LATEST>();
}
// Keeps the compiler from moving accesses across the places where products begin and end.
template <int N>
__device__ inline void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(registers[i]);
}

namespace detail {

namespace gmma = cute::SM90::GMMA;

template <typename T, int N>
struct Product;
#define FASTVIT_PRODUCT(N)                                                                   \
  template <>                                                                                \
  struct Product<__nv_bfloat16, N> {                                                         \
    using Shared = gmma::MMA_64x##N##x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;     \
    using Registers = gmma::MMA_64x##N##x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>; \
    using Across = gmma::MMA_64x##N##x16_F32BF16BF16_SS<gmma::Major::MN, gmma::Major::MN>;   \
  };                                                                                         \
  template <>                                                                                \
  struct Product<__half, N> {                                                                \
    using Shared = gmma::MMA_64x##N##x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K>;       \
    using Registers = gmma::MMA_64x##N##x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;   \
    using Across = gmma::MMA_64x##N##x16_F32F16F16_SS<gmma::Major::MN, gmma::Major::MN>;     \
  };
FASTVIT_PRODUCT(16)
FASTVIT_PRODUCT(64)
FASTVIT_PRODUCT(80)
FASTVIT_PRODUCT(128)
FASTVIT_PRODUCT(160)
FASTVIT_PRODUCT(192)
FASTVIT_PRODUCT(208)
FASTVIT_PRODUCT(256)
#undef FASTVIT_PRODUCT

template <typename Op, size_t... I>
__device__ inline void multiply(float* d, uint64_t a, uint64_t b, bool add, std::index_sequence<I...>) {
  Op::fma(a, b, d[I]..., add ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
template <typename Op, size_t... I>
__device__ inline void multiply(float* d, const uint32_t* a, uint64_t b, bool add, std::index_sequence<I...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[I]..., add ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}

}  // namespace detail

// d (64, N) = a (64, 16) b (16, N), plus d with `add`; N / 2 registers of a thread. Both in shared memory, k running
// fastest.
template <typename T, int N>
__device__ inline void multiply(float* d, uint64_t a, uint64_t b, bool add) {
  detail::multiply<typename detail::Product<T, N>::Shared>(d, a, b, add, std::make_index_sequence<N / 2>());
}
// The same with a's fragment in four registers, and n running fastest in b.
template <typename T, int N>
__device__ inline void multiply(float* d, const uint32_t* a, uint64_t b, bool add) {
  detail::multiply<typename detail::Product<T, N>::Registers>(d, a, b, add, std::make_index_sequence<N / 2>());
}

// Both in shared memory, m and n running fastest.
template <typename T, int N>
__device__ inline void multiply_across(float* d, uint64_t a, uint64_t b, bool add) {
  detail::multiply<typename detail::Product<T, N>::Across>(d, a, b, add, std::make_index_sequence<N / 2>());
}

// Four matrices of 8 x 8 values from a warp's registers, a word of each in every thread, as in products' results.
// Thread 8 m + i says where row i of matrix m goes: 16 bytes.
__device__ inline void store_matrices(void* row, const uint32_t* words) {
  cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], *static_cast<cute::uint128_t*>(row));
}
// This thread's writes to shared memory, to products that begin after the next barrier.
__device__ inline void show_writes() { cutlass::arch::fence_view_async_shared(); }

// cuTensorMapEncodeTiled of the driver, which nothing here is linked to; null where it is too old.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    const bool ok = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

// A launch that overlaps with the kernel before it, see csrc/cuda/common.cuh.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int blocks, int threads, int shared, const Params& p, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {
    cudaLaunchAttribute overlap = overlapping_launch();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, p);
  }
  const cudaError_t pending = cudaGetLastError();
  return error != cudaSuccess ? error : pending;
}

}  // namespace fastvit::sm90::hopper
