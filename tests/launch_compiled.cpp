// csrc/cuda/compiled_kernel.h for fake_cuda_driver.py: the driver is the libcuda.so.1 that the process has loaded.
#include <dlfcn.h>

#include "cuda/compiled_kernel.h"

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *entry = dlsym(RTLD_DEFAULT, name);
  *found = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

int launch_compiled(const fastvit::CompiledKernel* kernel, void* const* pointers, void* stream) {
  const auto p = pointers;
  return fastvit::launch_compiled(*kernel, {p[0], p[1], p[2], p[3], p[4]}, static_cast<cudaStream_t>(stream));
}
}
