// The three activations, each x * gate(x), and their derivatives, sixteen values at a time.
#pragma once

#include "simd.h"

namespace fastvit::cpu {

enum class Activation { gelu, gelu_tanh, quick_gelu };

struct Gate {
  f32x16 value, slope;
};

// The normal distribution's integral. |x| is small: 1/2 + erf/2 by its odd series. Otherwise from erfc(t) = exp(r(t)),
// which loses nothing on the negative side. Coefficients: N. Juffa's erff, error below 1 ulp of erf.
FASTVIT_INLINE f32x16 normal_cdf(f32x16 x) {
  const f32x16 a = x * 0.707106781f;
  const f32x16 t = from_bits(bits(a) & 0x7fffffff), s = a * a;
  f32x16 r = t * -1.72853470e-5f + 3.83197126e-4f;
  const f32x16 u = t * -3.88396438e-3f + 2.42546219e-2f;
  r = r * s + u;
  r = r * t + -1.06777877e-1f;
  r = r * t + -6.34846687e-1f;
  r = r * t + -1.28717512e-1f;
  r = r * t - t;
  const f32x16 tail = exp16(r) * 0.5f;
  const f32x16 far = a < 0.0f ? tail : 1.0f - tail;

  f32x16 q = s * -5.96761703e-4f + 4.99119423e-3f;
  q = q * s + -2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s + -3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  const f32x16 near = (q * a + a) * 0.5f + 0.5f;
  return t > 0.927734375f ? far : near;
}

FASTVIT_INLINE f32x16 sigmoid(f32x16 z) { return 1.0f / (1.0f + exp16(-z)); }

template <Activation A>
FASTVIT_INLINE f32x16 gate(f32x16 x) {
  if constexpr (A == Activation::gelu) return normal_cdf(x);
  if constexpr (A == Activation::gelu_tanh) return sigmoid(x * (1.59576912f + 0.0713548162f * x * x));
  return sigmoid(1.702f * x);
}

template <Activation A>
FASTVIT_INLINE Gate gate_and_slope(f32x16 x) {
  const f32x16 g = gate<A>(x);
  if constexpr (A == Activation::gelu) return {g, exp16(x * x * -0.5f) * 0.398942280f};
  if constexpr (A == Activation::gelu_tanh) return {g, g * (1.0f - g) * (1.59576912f + 0.214064449f * x * x)};
  return {g, g * (1.0f - g) * 1.702f};
}

}  // namespace fastvit::cpu
