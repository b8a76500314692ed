// The activations and their derivatives: one source for kernels, GEMM epilogues and, on the host, their tests.
#pragma once

#include <cmath>

#include "layernorm_mlp.h"
#include "normal_tail.h"

#ifdef __CUDACC__
#define FASTVIT_BOTH __host__ __device__ __forceinline__
#else
#define FASTVIT_BOTH inline
#endif

namespace fastvit {

// Every activation here is h * value; its derivative is value + h * slope.
struct Gate {
  float value, slope;
};

// 2^x and 1 / x by the special function unit, to about 2^-22.
FASTVIT_BOTH float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
#endif
}

FASTVIT_BOTH float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.f, x);
#else
  return 1.f / x;
#endif
}

// min(|x|, limit), NaN for NaN.
FASTVIT_BOTH float magnitude(float x, float limit) {
#ifdef __CUDA_ARCH__
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(fabsf(x)), "f"(limit));
  return y;
#else
  return std::fabs(x) > limit ? limit : std::fabs(x);
#endif
}

// Phi(-a) for a in [0, NormalTail::end]; see the fit.
FASTVIT_BOTH float normal_tail(float a) {
  float p = NormalTail::c6;
  p = fmaf(p, a, NormalTail::c5);
  p = fmaf(p, a, NormalTail::c4);
  p = fmaf(p, a, NormalTail::c3);
  p = fmaf(p, a, NormalTail::c2);
  p = fmaf(p, a, NormalTail::c1);
  p = fmaf(p, a, NormalTail::c0);
  return fast_exp2(p);
}

constexpr float kLog2E = 1.4426950409f, kNormalPeak = 0.3989422804f;
constexpr float kTanhScale = 0.7978845608f, kTanhCubic = 0.044715f;  // sqrt(2 / pi)

// sigmoid(z), and its derivative times dz. From e^-|z|, since 1 - sigmoid(z) would lose every digit of a large z.
template <bool FAST>
FASTVIT_BOTH Gate sigmoid_gate(float z, float dz) {
  const float e = FAST ? fast_exp2(-kLog2E * fabsf(z)) : expf(-fabsf(z));
  const float large = FAST ? fast_reciprocal(1.f + e) : 1.f / (1.f + e), small = e * large;
  return {z > 0.f ? large : small, large * small * dz};
}

// FAST is for 16-bit results.
template <Activation ACT, bool FAST>
FASTVIT_BOTH Gate gate(float h) {
  if constexpr (ACT == Activation::kQuickGelu) {
    return sigmoid_gate<FAST>(1.702f * h, 1.702f);
  } else if constexpr (ACT == Activation::kGeluTanh) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    const float z = 2.f * kTanhScale * h * (1.f + kTanhCubic * h * h);
    return sigmoid_gate<FAST>(z, 2.f * kTanhScale * (1.f + 3.f * kTanhCubic * h * h));
  } else if constexpr (ACT == Activation::kGelu && FAST) {
    const float tail = normal_tail(magnitude(h, NormalTail::end));
    return {h > 0.f ? 1.f - tail : tail, kNormalPeak * fast_exp2(-0.5f * kLog2E * h * h)};
  } else if constexpr (ACT == Activation::kGelu) {
    return {0.5f + 0.5f * erff(0.7071067812f * h), kNormalPeak * expf(-0.5f * h * h)};
  } else {
    return {1.f, 0.f};
  }
}

template <Activation ACT, bool FAST>
FASTVIT_BOTH float activate(float h) {
  if constexpr (ACT == Activation::kGelu && FAST) {
    const float a = magnitude(h, NormalTail::end);
    return fmaf(-a, normal_tail(a), fmaxf(h, 0.f));
  } else {
    return h * gate<ACT, FAST>(h).value;
  }
}

}  // namespace fastvit
