// Philox-4x32-10, sixteen counters at a time: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011).
#pragma once

#include "vector.h"

namespace fastvit::cpu::FASTVIT_ISA {

using longs = uint64_t __attribute__((vector_size(FASTVIT_REGISTER_BYTES)));

// The 64-bit products of the lower halves; what the upper halves hold does not matter.
FASTVIT_INLINE longs wide_product(longs a, longs b) {
#if FASTVIT_REGISTER_BYTES > 16
  longs product;
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
  return product;
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The first random word of the counters (c0, c1, c2, 0), in the lower halves as they are.
FASTVIT_INLINE longs philox(longs c0, longs c1, longs c2, uint32_t k0, uint32_t k1) {
  const longs m0 = longs{} + 0xD2511F53, m1 = longs{} + 0xCD9E8D57;
  longs c3{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const longs low = wide_product(c0, m0), high = wide_product(c2, m1);
    c0 = (high >> 32) ^ c1 ^ uint64_t{k0};
    c1 = high;
    c2 = (low >> 32) ^ c3 ^ uint64_t{k1};
    c3 = low;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

// The mask of the weights that are kept. Even and odd lanes are drawn apart, so that products have room.
FASTVIT_INLINE u32x16 kept(const Dropout& dropout, u32x16 key, u32x16 query, int64_t head) {
  const longs place = longs{} + static_cast<uint32_t>(head);
  u32x16 word;
  FASTVIT_EACH_PART {
    const longs keys = (longs)key.part[i], queries = (longs)query.part[i];
    const longs even = philox(keys, queries, place, dropout.seed_low, dropout.seed_high);
    const longs odd = philox(keys >> 32, queries >> 32, place, dropout.seed_low, dropout.seed_high);
    word.part[i] = (words)((even & 0xffffffff) | odd << 32);
  }
  return (word >> 8) >= u32x16(dropout.threshold);
}

}  // namespace fastvit::cpu::FASTVIT_ISA
