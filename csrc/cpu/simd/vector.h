// Sixteen floats at a time with the compiler's vector types: no intrinsics, any instruction set.
//
// The headers of this folder are compiled once for every instruction set (avx512.cpp, avx2.cpp, baseline.cpp), each
// time in a namespace of its own, FASTVIT_ISA, with registers of FASTVIT_REGISTER_BYTES. Sixteen floats are one, two or
// four registers; a single vector type of 64 bytes would do everywhere, but GCC keeps what is wider than a register in
// memory.
#pragma once

#include "../kernels.h"

#define FASTVIT_ALWAYS_INLINE __attribute__((always_inline))
#define FASTVIT_INLINE inline FASTVIT_ALWAYS_INLINE
#define FASTVIT_EACH_PART for (int i = 0; i < PARTS; ++i)

// Vectors cross only inlined calls, so the warning about their calling convention says nothing here.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastvit::cpu::FASTVIT_ISA {

constexpr int REGISTER = FASTVIT_REGISTER_BYTES / sizeof(float);  // floats a register
constexpr int PARTS = LANES / REGISTER;

using floats = float __attribute__((vector_size(FASTVIT_REGISTER_BYTES)));
using words = uint32_t __attribute__((vector_size(FASTVIT_REGISTER_BYTES)));
using ints = int32_t __attribute__((vector_size(FASTVIT_REGISTER_BYTES)));
using doubles = double __attribute__((vector_size(FASTVIT_REGISTER_BYTES)));
using half_floats = float __attribute__((vector_size(FASTVIT_REGISTER_BYTES / 2)));
using shorts = uint16_t __attribute__((vector_size(FASTVIT_REGISTER_BYTES / 2)));
using bytes = uint8_t __attribute__((vector_size(FASTVIT_REGISTER_BYTES / 4)));

struct f32x16 {
  floats part[PARTS];
  f32x16() = default;
  // value - 0 is value, so that only a broadcast is left; value + 0 would turn -0 into 0 and has to be computed
  FASTVIT_INLINE f32x16(float value) { FASTVIT_EACH_PART part[i] = value - floats{}; }
};

// Bit patterns, integers, and masks: a lane of a mask is all ones or all zeros.
struct u32x16 {
  words part[PARTS];
  u32x16() = default;
  FASTVIT_INLINE u32x16(uint32_t value) { FASTVIT_EACH_PART part[i] = words{} + value; }
};

struct f64x16 {
  doubles part[2 * PARTS];
};

#define FASTVIT_BINARY(type, op)                          \
  FASTVIT_INLINE type operator op(type a, type b) {       \
    FASTVIT_EACH_PART a.part[i] = a.part[i] op b.part[i]; \
    return a;                                             \
  }
FASTVIT_BINARY(f32x16, +)
FASTVIT_BINARY(f32x16, -)
FASTVIT_BINARY(f32x16, *)
FASTVIT_BINARY(f32x16, /)
FASTVIT_BINARY(u32x16, +)
FASTVIT_BINARY(u32x16, &)
FASTVIT_BINARY(u32x16, |)
#undef FASTVIT_BINARY

#define FASTVIT_COMPARISON(type, op)                                  \
  FASTVIT_INLINE u32x16 operator op(type a, type b) {                 \
    u32x16 mask;                                                      \
    FASTVIT_EACH_PART mask.part[i] = (words)(a.part[i] op b.part[i]); \
    return mask;                                                      \
  }
FASTVIT_COMPARISON(f32x16, <)
FASTVIT_COMPARISON(f32x16, >)
FASTVIT_COMPARISON(f32x16, ==)
FASTVIT_COMPARISON(u32x16, <)
FASTVIT_COMPARISON(u32x16, >)
FASTVIT_COMPARISON(u32x16, >=)
#undef FASTVIT_COMPARISON

FASTVIT_INLINE f32x16 operator-(f32x16 a) {
  FASTVIT_EACH_PART a.part[i] = -a.part[i];
  return a;
}
FASTVIT_INLINE f32x16& operator+=(f32x16& a, f32x16 b) { return a = a + b; }

FASTVIT_INLINE u32x16 operator<<(u32x16 a, int count) {
  FASTVIT_EACH_PART a.part[i] <<= count;
  return a;
}
FASTVIT_INLINE u32x16 operator>>(u32x16 a, int count) {
  FASTVIT_EACH_PART a.part[i] >>= count;
  return a;
}

// Lanes of `a` where the mask is set, else of `b`.
FASTVIT_INLINE f32x16 select(u32x16 mask, f32x16 a, f32x16 b) {
  FASTVIT_EACH_PART a.part[i] = (ints)mask.part[i] ? a.part[i] : b.part[i];
  return a;
}
FASTVIT_INLINE u32x16 select(u32x16 mask, u32x16 a, u32x16 b) {
  FASTVIT_EACH_PART a.part[i] = (ints)mask.part[i] ? a.part[i] : b.part[i];
  return a;
}

// a > b ? a : b and a < b ? a : b, so b where one is NaN. The compiler makes a comparison and a choice of these, and
// the intrinsics would bind the templates to one target.
FASTVIT_INLINE f32x16 larger(f32x16 a, f32x16 b) {
#if FASTVIT_HAS_DOT_PAIRS
  asm("vmaxps %2, %1, %0" : "=v"(a.part[0]) : "v"(a.part[0]), "v"(b.part[0]));
  return a;
#else
  return select(a > b, a, b);
#endif
}
FASTVIT_INLINE f32x16 smaller(f32x16 a, f32x16 b) {
#if FASTVIT_HAS_DOT_PAIRS
  asm("vminps %2, %1, %0" : "=v"(a.part[0]) : "v"(a.part[0]), "v"(b.part[0]));
  return a;
#else
  return select(a < b, a, b);
#endif
}

FASTVIT_INLINE u32x16 bits(f32x16 value) {
  u32x16 out;
  FASTVIT_EACH_PART out.part[i] = (words)value.part[i];
  return out;
}
FASTVIT_INLINE f32x16 from_bits(u32x16 value) {
  f32x16 out;
  FASTVIT_EACH_PART out.part[i] = (floats)value.part[i];
  return out;
}

FASTVIT_INLINE void operator+=(f64x16& sum, f32x16 value) {
  FASTVIT_EACH_PART {
    half_floats halves[2];
    __builtin_memcpy(halves, &value.part[i], sizeof(halves));
    sum.part[2 * i] += __builtin_convertvector(halves[0], doubles);
    sum.part[2 * i + 1] += __builtin_convertvector(halves[1], doubles);
  }
}

FASTVIT_INLINE void add_lanes(double* total, f64x16 sum) {
  constexpr int step = sizeof(doubles) / sizeof(double);
  for (int i = 0; i < 2 * PARTS; ++i) {
    for (int lane = 0; lane < step; ++lane) total[i * step + lane] += sum.part[i][lane];
  }
}

// 0, 1, ..., 15
FASTVIT_INLINE u32x16 lane_numbers() {
  constexpr uint32_t index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  u32x16 lane;
  FASTVIT_EACH_PART __builtin_memcpy(&lane.part[i], index + i * REGISTER, sizeof(words));
  return lane;
}

// The mask of the first `count` lanes.
FASTVIT_INLINE u32x16 first(int64_t count) { return lane_numbers() < u32x16(static_cast<uint32_t>(count)); }

FASTVIT_INLINE f32x16 load16(const float* src) {
  f32x16 value;
  FASTVIT_EACH_PART __builtin_memcpy(&value.part[i], src + i * REGISTER, sizeof(floats));
  return value;
}

FASTVIT_INLINE u32x16 load_u16(const void* src) {
  u32x16 value;
  FASTVIT_EACH_PART {
    shorts part;
    __builtin_memcpy(&part, static_cast<const uint16_t*>(src) + i * REGISTER, sizeof(part));
    value.part[i] = __builtin_convertvector(part, words);
  }
  return value;
}

FASTVIT_INLINE f32x16 load16(const uint8_t* src) {
  f32x16 value;
  FASTVIT_EACH_PART {
    bytes part;
    __builtin_memcpy(&part, src + i * REGISTER, sizeof(part));
    value.part[i] = __builtin_convertvector(__builtin_convertvector(part, ints), floats);
  }
  return value;
}

FASTVIT_INLINE f32x16 load16(const c10::BFloat16* src) { return from_bits(load_u16(src) << 16); }

FASTVIT_INLINE f32x16 load16(const c10::Half* src) {
  const u32x16 half = load_u16(src);
  const u32x16 magnitude = (half & 0x7fff) << 13;
  const u32x16 scaled = bits(from_bits(magnitude) * 0x1p112f);
  // An all-ones exponent (inf, NaN) stays all ones.
  const u32x16 value = select(magnitude >= 0x0f800000u, magnitude | 0x7f800000u, scaled);
  return from_bits(value | (half & 0x8000) << 16);
}

FASTVIT_INLINE void store16(float* dst, f32x16 value) {
  FASTVIT_EACH_PART __builtin_memcpy(dst + i * REGISTER, &value.part[i], sizeof(floats));
}

FASTVIT_INLINE void store_u32(void* dst, u32x16 value) {
  FASTVIT_EACH_PART __builtin_memcpy(static_cast<uint32_t*>(dst) + i * REGISTER, &value.part[i], sizeof(words));
}

FASTVIT_INLINE void store_u16(void* dst, u32x16 value) {
  FASTVIT_EACH_PART {
    const shorts part = __builtin_convertvector(value.part[i], shorts);
    __builtin_memcpy(static_cast<uint16_t*>(dst) + i * REGISTER, &part, sizeof(part));
  }
}

#if FASTVIT_HAS_DOT_PAIRS
// The processor's own rounding, where it has one: also to nearest even, but numbers below 2^-126 become 0. The
// intrinsic would bind the templates to one target.
static const bool ROUNDS_TO_BF16 = __builtin_cpu_supports("avx512bf16");
FASTVIT_INLINE shorts rounded_to_bf16(f32x16 value) {
  shorts rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(value.part[0]));
  return rounded;
}
#endif

// Round to nearest even; the result sits in the low 16 bits.
FASTVIT_INLINE u32x16 bf16_bits(f32x16 value) {
#if FASTVIT_HAS_DOT_PAIRS
  if (__builtin_expect(ROUNDS_TO_BF16, true)) {
    u32x16 out;
    out.part[0] = __builtin_convertvector(rounded_to_bf16(value), words);
    return out;
  }
#endif
  const u32x16 raw = bits(value);
  const u32x16 rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  return select((raw & 0x7fffffff) > 0x7f800000u, 0x7fc0u, rounded);
}

FASTVIT_INLINE void store16(c10::BFloat16* dst, f32x16 value) {
#if FASTVIT_HAS_DOT_PAIRS
  if (__builtin_expect(ROUNDS_TO_BF16, true)) {
    const shorts rounded = rounded_to_bf16(value);
    __builtin_memcpy(dst, &rounded, sizeof(rounded));
    return;
  }
#endif
  store_u16(dst, bf16_bits(value));
}

// Two rows of bfloat16, the values of a column side by side.
FASTVIT_INLINE void store_pairs(c10::BFloat16* dst, f32x16 even, f32x16 odd) {
  store_u32(dst, bf16_bits(even) | bf16_bits(odd) << 16);
}

// Round to nearest even by adding a power of two that pushes the discarded bits out of the mantissa.
FASTVIT_INLINE void store16(c10::Half* dst, f32x16 value) {
  const u32x16 raw = bits(value), doubled = raw + raw;
  const f32x16 scaled = (from_bits(raw & 0x7fffffff) * 0x1p112f) * 0x1p-110f;
  const u32x16 exponent = doubled & 0xff000000u;
  const u32x16 floor = select(exponent < 0x71000000u, 0x71000000u, exponent);
  const u32x16 sum = bits(from_bits((floor >> 1) + 0x07800000u) + scaled);
  const u32x16 finite = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  const u32x16 magnitude = select(doubled > 0xff000000u, 0x7e00u, finite);
  store_u16(dst, magnitude | ((raw & 0x80000000u) >> 16));
}

// The first `count` (1..16) lanes; the others are zero and memory behind them is not touched.
template <class S>
FASTVIT_INLINE f32x16 load_part(const S* src, int64_t count) {
  if (count >= LANES) return load16(src);
  S part[LANES] = {};
  __builtin_memcpy(part, src, count * sizeof(S));
  return load16(part);
}

template <class S>
FASTVIT_INLINE void store_part(S* dst, f32x16 value, int64_t count) {
  if (count >= LANES) return store16(dst, value);
  S part[LANES];
  store16(part, value);
  __builtin_memcpy(dst, part, count * sizeof(S));
}

// The first `size` (at least 1) of 64 bytes, zeros behind them.
FASTVIT_INLINE f32x16 load_bytes(const char* src, int64_t size) {
  constexpr int64_t all = LANES * sizeof(float);
  if (size >= all) return load16(reinterpret_cast<const float*>(src));
  float part[LANES] = {};
  __builtin_memcpy(part, src, size);
  return load16(part);
}

// Register `a` takes the lanes 0, 1, ..., register `b` those that follow.
#if defined(__clang__)
#define FASTVIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTVIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

// Lanes of a register exchanged with those `distance` further on, and the lower and upper lanes of two interleaved.
template <int distance>
FASTVIT_INLINE floats exchanged(floats v) {
#if FASTVIT_REGISTER_BYTES == 64
  if constexpr (distance == 8) return FASTVIT_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (distance == 4) return FASTVIT_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (distance == 2) return FASTVIT_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  if constexpr (distance == 1) return FASTVIT_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif FASTVIT_REGISTER_BYTES == 32
  if constexpr (distance == 4) return FASTVIT_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if constexpr (distance == 2) return FASTVIT_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  if constexpr (distance == 1) return FASTVIT_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  if constexpr (distance == 2) return FASTVIT_SHUFFLE(v, v, 2, 3, 0, 1);
  if constexpr (distance == 1) return FASTVIT_SHUFFLE(v, v, 1, 0, 3, 2);
#endif
}

FASTVIT_INLINE floats interleaved_low(floats a, floats b) {
#if FASTVIT_REGISTER_BYTES == 64
  return FASTVIT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif FASTVIT_REGISTER_BYTES == 32
  return FASTVIT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return FASTVIT_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

FASTVIT_INLINE floats interleaved_high(floats a, floats b) {
#if FASTVIT_REGISTER_BYTES == 64
  return FASTVIT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif FASTVIT_REGISTER_BYTES == 32
  return FASTVIT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return FASTVIT_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// One lane left of sixteen folded in half four times.
template <class Fold>
FASTVIT_INLINE float fold_lanes(f32x16 value) {
  for (int count = PARTS / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) value.part[i] = Fold::of(value.part[i], value.part[i + count]);
  }
  floats v = value.part[0];
  if constexpr (REGISTER == 16) v = Fold::of(v, exchanged<8>(v));
  if constexpr (REGISTER >= 8) v = Fold::of(v, exchanged<4>(v));
  v = Fold::of(v, exchanged<2>(v));
  return Fold::of(v, exchanged<1>(v))[0];
}

struct Sum {
  static FASTVIT_INLINE floats of(floats a, floats b) { return a + b; }
};
struct Max {
  static FASTVIT_INLINE floats of(floats a, floats b) { return a > b ? a : b; }
};
FASTVIT_INLINE float sum_lanes(f32x16 value) { return fold_lanes<Sum>(value); }
FASTVIT_INLINE float max_lanes(f32x16 value) { return fold_lanes<Max>(value); }

// Transpose a square of registers: perfect shuffles of its rows rotate the index bits (row, column) into (column, row).
FASTVIT_INLINE void transpose_square(floats (&square)[REGISTER]) {
  for (int round = 1; round < REGISTER; round *= 2) {
    floats shuffled[REGISTER];
#pragma GCC unroll 8
    for (int i = 0; i < REGISTER / 2; ++i) {
      shuffled[2 * i] = interleaved_low(square[i], square[i + REGISTER / 2]);
      shuffled[2 * i + 1] = interleaved_high(square[i], square[i + REGISTER / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < REGISTER; ++i) square[i] = shuffled[i];
  }
}

// Transpose a 16 x 16 tile, one square of registers after the other.
FASTVIT_INLINE void transpose16(const f32x16 (&tile)[LANES], f32x16 (&out)[LANES]) {
#pragma GCC unroll 4
  for (int row = 0; row < PARTS; ++row) {
#pragma GCC unroll 4
    for (int column = 0; column < PARTS; ++column) {
      floats square[REGISTER];
#pragma GCC unroll 16
      for (int i = 0; i < REGISTER; ++i) square[i] = tile[row * REGISTER + i].part[column];
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < REGISTER; ++i) out[column * REGISTER + i].part[row] = square[i];
    }
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
