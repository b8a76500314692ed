// The fit behind erf GELU in 16 bits, shared by the GPU's epilogues and the CPU's.
#pragma once

namespace fastvit {

// Phi(-a), the normal distribution's tail, is 2^p(a) with p(a) = c0 + c1 a + ... + c6 a^6: the minimax fit of
// log2 Phi(-a) on [0, 6]. The result is within 5e-5 of its own size there, and below 1e-9 beyond. bf16 rounds to 2e-3,
// fp16 to 2.4e-4.
struct NormalTail {
  static constexpr float c0 = -1.000064731e+00f, c1 = -1.150174260e+00f, c2 = -4.612719417e-01f, c3 = -5.118532106e-02f,
                         c4 = 7.195561193e-03f, c5 = -6.110993563e-04f, c6 = 2.299002154e-05f;
  static constexpr float end = 14.f;  // 2^p is zero in float32 from here on
};

}  // namespace fastvit
