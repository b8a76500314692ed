// exp, and the three activations, each x * gate(x), with their derivatives; sixteen values at a time.
#pragma once

#include "vector.h"

namespace fastvit::cpu::FASTVIT_ISA {

constexpr float INF = std::numeric_limits<float>::infinity();

// exp(x) to 1 ulp; 0 below the smallest normal number, inf above the largest.
FASTVIT_INLINE f32x16 exp16(f32x16 x) {
  constexpr float round_bias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 shifted = x * 1.44269504f + round_bias;
  const f32x16 n = shifted - round_bias;
  const f32x16 f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = f * 1.37805939e-3f + 8.37312452e-3f;
  p = p * f + 4.16695364e-2f;
  p = p * f + 1.66664720e-1f;
  p = p * f + 4.99999851e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const u32x16 power = (bits(shifted) << 23) + 0x3f800000u;
  const f32x16 value = select(x < -87.3f, 0.0f, p * from_bits(power));
  return select(x > 88.3f, INF, value);
}

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
  const f32x16 far = select(a < 0.0f, tail, 1.0f - tail);

  f32x16 q = s * -5.96761703e-4f + 4.99119423e-3f;
  q = q * s + -2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s + -3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  const f32x16 near = (q * a + a) * 0.5f + 0.5f;
  return select(t > 0.927734375f, far, near);
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

}  // namespace fastvit::cpu::FASTVIT_ISA
