// A kernel that Triton compiled and loaded, launched from C++ as Triton's own launcher does it.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace fastvit {

// What kernels/_launch.py packs of a launch: all but pointers and stream.
struct CompiledKernel {
  static constexpr uint32_t kMostNumbers = 24;
  uint64_t function;  // a CUfunction
  uint32_t grid[3];
  uint32_t threads, shared, count;
  uint64_t numbers[kMostNumbers];  // the arguments behind the pointers, each in the low bytes of its place
};

using LaunchKernel = CUresult (*)(const CUlaunchConfig*, CUfunction, void** parameters, void** extra);

// The driver's entry, so that the library loads where there is no driver.
inline LaunchKernel find_launch_kernel() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuLaunchKernelEx", &entry, cudaEnableDefault, &found);
#endif
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<LaunchKernel>(entry) : nullptr;
}

// Triton's kernels take their pointers first, and two scratch areas, unused here, last.
inline cudaError_t launch_compiled(const CompiledKernel& kernel, std::initializer_list<void*> pointers,
                                   cudaStream_t stream) {
  static const LaunchKernel launch = find_launch_kernel();
  if (launch == nullptr) return cudaErrorNotSupported;
  void *given[8], *scratch = nullptr, *parameters[8 + CompiledKernel::kMostNumbers + 2];
  if (pointers.size() > 8 || kernel.count > CompiledKernel::kMostNumbers) return cudaErrorInvalidValue;
  void **next = parameters, **pointer = given;
  for (void* address : pointers) *pointer = address, *next++ = pointer++;
  for (uint32_t i = 0; i < kernel.count; ++i) *next++ = const_cast<uint64_t*>(&kernel.numbers[i]);
  *next++ = &scratch;
  *next++ = &scratch;
  CUlaunchConfig config{};
  config.gridDimX = kernel.grid[0], config.gridDimY = kernel.grid[1], config.gridDimZ = kernel.grid[2];
  config.blockDimX = kernel.threads, config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = kernel.shared;
  config.hStream = stream;
  return cudaError_t(launch(&config, reinterpret_cast<CUfunction>(kernel.function), parameters, nullptr));
}

}  // namespace fastvit
