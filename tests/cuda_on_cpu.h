// Runs CUDA kernels on the CPU: every thread of a block is a fiber, switched at barriers and shuffles.
//
// For tests on a machine without a GPU. One block runs at a time, so shared memory is static storage. A warp's threads
// meet at every shuffle, a block's at every barrier; a warp with some threads at one and some at the other aborts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_on_cpu {

constexpr size_t kStack = 128 * 1024;
constexpr int kBarrier = 1, kShuffle = 2;

struct Fiber {
  Fiber();
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  uint3 thread{};
  bool done = false;
  int waits_at = 0;
  int shuffles = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline Fiber* current = nullptr;
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline const std::function<void()>* kernel = nullptr;
inline float exchanged[2][1024];

inline unsigned flat_thread() {
  return current->thread.x + block_size.x * (current->thread.y + block_size.y * current->thread.z);
}

// _setjmp and _longjmp change stacks without the system calls of swapcontext.
__attribute__((noinline)) inline void leave() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(int kind) {
  current->waits_at = kind;
  leave();
}

// A fiber is one thread of every block in turn.
inline void run_threads() {
  for (;;) {
    (*kernel)();
    current->done = true;
    leave();
  }
}

inline Fiber::Fiber() {
  getcontext(&start);
  start.uc_stack.ss_sp = stack.get();
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, run_threads, 0);
}

// Threads [first, last) up to where they wait next; 0 where all are done.
inline int run_to_next_wait(unsigned first, unsigned last) {
  int kind = 0;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i]->done) continue;
    resume(*fibers[i]);
    if (current->done) continue;
    if (kind != 0 && kind != current->waits_at) {
      std::fputs("cuda_on_cpu: the threads of a warp wait at different places\n", stderr);
      std::abort();
    }
    kind = current->waits_at;
  }
  return kind;
}

// From barrier to barrier, a warp after the other.
inline void run_block() {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->thread = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    fibers[i]->done = false;
    fibers[i]->shuffles = 0;
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (unsigned warp = 0; warp < threads; warp += 32) {
      int kind;
      while ((kind = run_to_next_wait(warp, std::min(warp + 32, threads))) == kShuffle) {
      }
      alive |= kind == kBarrier;
    }
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  grid_size = grid, block_size = block, kernel = &body;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535) {
    std::fputs("cuda_on_cpu: a launch that a GPU would refuse\n", stderr);
    std::abort();
  }
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = {x, y, 0};
      run_block();
    }
  }
}

}  // namespace cuda_on_cpu

template <typename... Params, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Arguments&&... arguments) {
  cuda_on_cpu::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}

#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx (cuda_on_cpu::block_index)
// no macros: a launch's configuration has members of these names
inline dim3& blockDim = cuda_on_cpu::block_size;
inline dim3& gridDim = cuda_on_cpu::grid_size;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::kBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  float* slots = cuda_on_cpu::exchanged[cuda_on_cpu::current->shuffles++ % 2];
  slots[cuda_on_cpu::flat_thread()] = value;
  cuda_on_cpu::wait(cuda_on_cpu::kShuffle);
  return slots[cuda_on_cpu::flat_thread() ^ mask];
}

inline float __uint_as_float(uint32_t v) { return reinterpret_cast<float&>(v); }
inline uint32_t __float_as_uint(float v) { return reinterpret_cast<uint32_t&>(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
using std::max;
using std::min;
