// From memory into shared memory by way of no register, while the thread goes on (Ampere and later).
#pragma once

#include <cuda_runtime_api.h>

namespace fastvit {

// 16 bytes. Groups of copies arrive in order.
__device__ inline void copy_async(uint4* shared, const uint4* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *shared = *global;
#endif
}

__device__ inline void end_group_of_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// For those that this thread asked for, but the last groups.
template <int GROUPS>
__device__ inline void wait_for_copies_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

}  // namespace fastvit
