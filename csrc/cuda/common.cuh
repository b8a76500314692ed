// What the kernels share: loads and stores of one or eight elements as floats, block sums, dtype switches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "layernorm_mlp.h"

namespace fastvit {

constexpr int kWarp = 32;
constexpr int kVec = 8;  // elements a thread handles at once: 16 bytes of a 16-bit dtype, 32 of float32

template <typename T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<__half>() {
  return DType::kFloat16;
}
template <>
constexpr DType dtype_of<__nv_bfloat16>() {
  return DType::kBFloat16;
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float(float v) {
  return v;
}
template <>
__device__ inline __half from_float(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}

// N elements as they lie in memory, in 32-bit words: half the registers of floats while several rows are in flight.
template <typename T, int N>
struct Packed {
  static constexpr int kWords = N * sizeof(T) / 4;
  uint32_t words[kWords];
};
template <typename T>
struct Packed<T, 1> {
  T value;
};

template <int N, typename T>
__device__ inline Packed<T, N> load_packed(const T* p) {
  Packed<T, N> out;
  if constexpr (N == 1) {
    out.value = *p;
  } else {
#pragma unroll
    for (int i = 0; i < out.kWords / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i];
      out.words[4 * i] = v.x, out.words[4 * i + 1] = v.y, out.words[4 * i + 2] = v.z, out.words[4 * i + 3] = v.w;
    }
  }
  return out;
}

template <typename T, int N>
__device__ inline void unpack(const Packed<T, N>& in, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = to_float(in.value);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __uint_as_float(in.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
        v[2 * i] = __uint_as_float(in.words[i] << 16);
        v[2 * i + 1] = __uint_as_float(in.words[i] & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(in.words[i]));
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
      }
    }
  }
}

template <int N, typename T>
__device__ inline void load(const T* p, float (&v)[N]) {
  unpack(load_packed<N>(p), v);
}

template <int N>
__device__ inline void add(const float* p, float (&v)[N]) {
  float other[N];
  load(p, other);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] += other[i];
}

// 16 bytes in one store: left to itself, nvcc splits an assignment through a uint4* into four.
__device__ inline void store_16_bytes(void* p, const uint32_t* words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
#else
  std::copy(words, words + 4, static_cast<uint32_t*>(p));
#endif
}

template <int N, typename T>
__device__ inline void store(T* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(v[0]);
  } else {
    uint32_t words[N * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) words[i] = __float_as_uint(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
          reinterpret_cast<__nv_bfloat162&>(words[i]) = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        } else {
          reinterpret_cast<__half2&>(words[i]) = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < int(sizeof(words)) / 16; ++i) {
      store_16_bytes(reinterpret_cast<char*>(p) + 16 * i, words + 4 * i);
    }
  }
}

// A parameter vector is float32 or T; the branch is the same for the whole grid. Absent: `otherwise`.
template <typename T, int N>
__device__ inline void load_param(const Vector& p, int64_t index, float otherwise, float (&v)[N]) {
  if (p.data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = otherwise;
  } else if (p.dtype == DType::kFloat32) {
    load(static_cast<const float*>(p.data) + index, v);
  } else {
    load(static_cast<const T*>(p.data) + index, v);
  }
}

template <typename T>
__device__ inline float param(const Vector& p, int64_t index, float otherwise) {
  float v[1];
  load_param<T>(p, index, otherwise, v);
  return v[0];
}

__device__ inline void store_param(const Vector& p, int64_t index, float v) {
  switch (p.dtype) {
    case DType::kFloat32:
      static_cast<float*>(p.data)[index] = v;
      break;
    case DType::kFloat16:
      static_cast<__half*>(p.data)[index] = __float2half_rn(v);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(p.data)[index] = __float2bfloat16_rn(v);
      break;
  }
}

template <typename T>
__device__ inline T* row_of(const Matrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Every thread gets the block's sum of each of the R values, added in a fixed order.
// `shared` holds R * (threads / 32) floats; calls in a row alternate between two of them, one barrier each.
template <int R>
__device__ inline void block_sum(float (&v)[R], float* shared) {
#pragma unroll
  for (int i = 0; i < R; ++i) v[i] = warp_sum(v[i]);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < R; ++i) shared[threadIdx.x / kWarp * R + i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < R; ++i) v[i] = shared[i];
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < R; ++i) v[i] += shared[warp * R + i];
  }
}

inline int multiprocessors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

inline int multiprocessors() {
  int device = 0;
  cudaGetDevice(&device);
  return multiprocessors(device);
}

// How many blocks run at once on the current device. More of them, where each walks over rows, would take another turn.
inline int blocks_at_once(const void* kernel, int threads) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  return multiprocessors() * std::max(blocks, 1);
}

// The same, asked once a device.
template <auto* KERNEL>
int blocks_at_once(int threads) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> known{};
  int device = 0;
  cudaGetDevice(&device);
  if (device < 0 || device >= kDevices) return blocks_at_once(reinterpret_cast<const void*>(KERNEL), threads);
  if (known[device] == 0) known[device] = blocks_at_once(reinterpret_cast<const void*>(KERNEL), threads);
  return known[device];
}

// Programmatic dependent launch, from Hopper on: the next kernel of a stream is set up while this one still runs. With
// few rows that is a good part of its time. A kernel launched so calls await_previous() before it touches memory: all
// work before it in the stream is then done, for each kernel waits for the one before it.
__device__ inline void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be set up once every block has come here.
__device__ inline void allow_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Whether what runs on this device has the wait in it: code compiled for an older architecture may stand in.
template <auto* KERNEL>
bool can_overlap(int device) {
  constexpr int kDevices = 64;
  enum : signed char { kUnknown, kYes, kNo };
  static std::array<std::atomic<signed char>, kDevices> known{};
  if (device < 0 || device >= kDevices) return false;
  if (known[device] == kUnknown) {
    cudaFuncAttributes facts{};
    const bool waits =
        cudaFuncGetAttributes(&facts, reinterpret_cast<const void*>(KERNEL)) == cudaSuccess && facts.ptxVersion >= 90;
    known[device] = waits ? kYes : kNo;
  }
  return known[device] == kYes;
}

inline cudaLaunchAttribute overlapping_launch() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

template <auto* KERNEL, typename Params>
cudaError_t launch_overlapping(dim3 grid, unsigned threads, const Params& p, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = overlapping_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap<KERNEL>(device);
  error = cudaLaunchKernelEx(&config, KERNEL, p);
  const cudaError_t pending = cudaGetLastError();
  return error != cudaSuccess ? error : pending;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct Type {
  using type = T;
};

// f(Type<T>) for the one dtype.
template <typename F>
cudaError_t with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat16:
      return f(Type<__half>{});
    case DType::kBFloat16:
      return f(Type<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

// f(Type<Wide>, Type<T>): `wide` is `narrow`, or float32 beside a 16-bit `narrow` (a residual stream under autocast).
template <typename F>
cudaError_t with_types(DType wide, DType narrow, F&& f) {
  return with_type(narrow, [&](auto type) -> cudaError_t {
    if (wide == narrow) return f(type, type);
    if constexpr (!std::is_same_v<typename decltype(type)::type, float>) {
      if (wide == DType::kFloat32) return f(Type<float>{}, type);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fastvit
