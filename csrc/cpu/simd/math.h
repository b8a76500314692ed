// exp, and the three activations, each x * gate(x), with their derivatives; sixteen values at a time.
#pragma once

#include "vector.h"

namespace fastvit::cpu::FASTVIT_ISA {

constexpr float INF = std::numeric_limits<float>::infinity();

// exp(x) to 1 ulp for x below 88; 0 below the smallest normal number.
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
  return select(x < -87.3f, 0.0f, p * from_bits(power));
}

// 2^x to 3e-6 of its size, for x from -126 to 127.
FASTVIT_INLINE f32x16 coarse_exp2(f32x16 x) {
  constexpr float round_bias = 12582912.0f;  // as in exp16
  const f32x16 shifted = x + round_bias;
  const f32x16 f = x - (shifted - round_bias);
  f32x16 p = f * 9.570086467e-3f + 5.591790116e-2f;
  p = p * f + 2.402474546e-1f;
  p = p * f + 6.931218100e-1f;
  p = p * f + 9.999992612e-1f;
  return from_bits(bits(p) + (bits(shifted) << 23));
}

struct Gate {
  f32x16 value, slope;
};

// Phi(-a) of the normal distribution to 5e-5 of its size, which bfloat16 rounds away; a from 0 to NormalTail::end.
FASTVIT_INLINE f32x16 coarse_tail(f32x16 a) {
  f32x16 p = a * NormalTail::c6 + NormalTail::c5;
  p = p * a + NormalTail::c4;
  p = p * a + NormalTail::c3;
  p = p * a + NormalTail::c2;
  p = p * a + NormalTail::c1;
  p = p * a + NormalTail::c0;
  return coarse_exp2(larger(-126.0f, p));
}

// |x|, but not beyond NormalTail::end
FASTVIT_INLINE f32x16 tail_argument(f32x16 x) { return smaller(NormalTail::end, from_bits(bits(x) & 0x7fffffff)); }

// x * normal_cdf(x) = max(x, 0) - |x| Phi(-|x|)
FASTVIT_INLINE f32x16 coarse_gelu(f32x16 x) {
  const f32x16 a = tail_argument(x);
  return larger(0.0f, x) - a * coarse_tail(a);
}

FASTVIT_INLINE Gate coarse_gelu_gate(f32x16 x) {
  const f32x16 a = tail_argument(x), tail = coarse_tail(a), p = a * a * -0.721347520f;
  return {select(x < 0.0f, tail, 1.0f - tail), coarse_exp2(larger(-126.0f, p)) * 0.398942280f};
}

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

// sigmoid(z), and its derivative times dz. From e^-|z|, since 1 - sigmoid(z) would lose every digit of a large z.
FASTVIT_INLINE Gate sigmoid_gate(f32x16 z, f32x16 dz) {
  const f32x16 e = exp16(-from_bits(bits(z) & 0x7fffffff));
  const f32x16 large = 1.0f / (1.0f + e), small = e * large;
  return {select(z > 0.0f, large, small), large * small * dz};
}

template <Activation A>
FASTVIT_INLINE Gate gate_and_slope(f32x16 x) {
  if constexpr (A == Activation::gelu) return {normal_cdf(x), exp16(x * x * -0.5f) * 0.398942280f};
  if constexpr (A == Activation::quick_gelu) return sigmoid_gate(1.702f * x, 1.702f);
  const f32x16 s = x * x;
  return sigmoid_gate(x * (1.59576912f + 0.0713548162f * s), 1.59576912f + 0.214064449f * s);
}

// As exact as results in S can be.
template <class S, Activation A>
constexpr bool COARSE = A == Activation::gelu && std::is_same_v<S, c10::BFloat16>;

template <class S, Activation A>
FASTVIT_INLINE f32x16 activate(f32x16 x) {
  if constexpr (COARSE<S, A>) return coarse_gelu(x);
  return x * gate_and_slope<A>(x).value;
}

// The activation, and `da` times its derivative.
struct ActivationGrad {
  f32x16 activated, dx;
};
template <class S, Activation A>
FASTVIT_INLINE ActivationGrad activation_grad(f32x16 x, f32x16 da) {
  const Gate g = COARSE<S, A> ? coarse_gelu_gate(x) : gate_and_slope<A>(x);
  return {x * g.value, da * (g.value + x * g.slope)};
}

}  // namespace fastvit::cpu::FASTVIT_ISA
