// Sixteen floats at a time with the compiler's vector types: no intrinsics, any instruction set.
//
// A function marked FASTVIT_CLONES is compiled for AVX-512, AVX2 and the baseline, and the loader picks one, so a
// single binary runs on every x86-64. What it calls must be FASTVIT_INLINE to be compiled along with it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <limits>

#if defined(__x86_64__) && defined(__linux__)
#define FASTVIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTVIT_CLONES
#endif
#define FASTVIT_INLINE inline __attribute__((always_inline))

// Vectors cross only inlined calls, so the warning about their calling convention says nothing here.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastvit::cpu {

constexpr int64_t LANES = 16;

using f32x16 = float __attribute__((vector_size(64)));
using f64x16 = double __attribute__((vector_size(128)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u8x16 = uint8_t __attribute__((vector_size(16)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

FASTVIT_INLINE f32x16 splat(float value) { return f32x16{} + value; }
FASTVIT_INLINE u32x16 bits(f32x16 value) { return (u32x16)value; }
FASTVIT_INLINE f32x16 from_bits(u32x16 value) { return (f32x16)value; }

FASTVIT_INLINE f32x16 load16(const float* src) {
  f32x16 value;
  __builtin_memcpy(&value, src, sizeof(value));
  return value;
}

FASTVIT_INLINE u32x16 load_u16(const void* src) {
  u16x16 value;
  __builtin_memcpy(&value, src, sizeof(value));
  return __builtin_convertvector(value, u32x16);
}

FASTVIT_INLINE f32x16 load16(const uint8_t* src) {
  u8x16 value;
  __builtin_memcpy(&value, src, sizeof(value));
  return __builtin_convertvector(value, f32x16);
}

FASTVIT_INLINE f32x16 load16(const c10::BFloat16* src) { return from_bits(load_u16(src) << 16); }

FASTVIT_INLINE f32x16 load16(const c10::Half* src) {
  const u32x16 half = load_u16(src);
  const u32x16 magnitude = (half & 0x7fff) << 13;
  const u32x16 scaled = bits(from_bits(magnitude) * 0x1p112f);
  // An all-ones exponent (inf, NaN) stays all ones.
  const u32x16 value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return from_bits(value | (half & 0x8000) << 16);
}

FASTVIT_INLINE void store16(float* dst, f32x16 value) { __builtin_memcpy(dst, &value, sizeof(value)); }

FASTVIT_INLINE void store_u16(void* dst, u32x16 value) {
  const u16x16 narrow = __builtin_convertvector(value, u16x16);
  __builtin_memcpy(dst, &narrow, sizeof(narrow));
}

// Round to nearest even; the result sits in the low 16 bits.
FASTVIT_INLINE u32x16 bf16_bits(f32x16 value) {
  const u32x16 raw = bits(value);
  const u32x16 rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  return (raw & 0x7fffffff) > 0x7f800000u ? (u32x16{} + 0x7fc0u) : rounded;
}

FASTVIT_INLINE void store16(c10::BFloat16* dst, f32x16 value) { store_u16(dst, bf16_bits(value)); }

// Round to nearest even by adding a power of two that pushes the discarded bits out of the mantissa.
FASTVIT_INLINE void store16(c10::Half* dst, f32x16 value) {
  const u32x16 raw = bits(value), doubled = raw + raw;
  const f32x16 scaled = (from_bits(raw & 0x7fffffff) * 0x1p112f) * 0x1p-110f;
  const u32x16 exponent = doubled & 0xff000000u;
  const u32x16 floor = exponent < 0x71000000u ? (u32x16{} + 0x71000000u) : exponent;
  const u32x16 sum = bits(from_bits((floor >> 1) + 0x07800000u) + scaled);
  const u32x16 finite = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  const u32x16 magnitude = doubled > 0xff000000u ? (u32x16{} + 0x7e00u) : finite;
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

// The first `bytes` (at least 1) of 64, zeros behind them.
FASTVIT_INLINE f32x16 load_bytes(const char* src, int64_t bytes) {
  if (bytes >= static_cast<int64_t>(sizeof(f32x16))) return load16(reinterpret_cast<const float*>(src));
  f32x16 part{};
  __builtin_memcpy(&part, src, bytes);
  return part;
}

// Lanes 0..15 are those of `a`, 16..31 those of `b`.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTVIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef FASTVIT_SHUFFLE
#define FASTVIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

// Lane 0 of the vector folded in half four times.
template <class Fold>
FASTVIT_INLINE float fold_lanes(f32x16 value, const Fold& fold) {
  value = fold(value, FASTVIT_SHUFFLE(value, value, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  value = fold(value, FASTVIT_SHUFFLE(value, value, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  value = fold(value, FASTVIT_SHUFFLE(value, value, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return fold(value, FASTVIT_SHUFFLE(value, value, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))[0];
}

FASTVIT_INLINE float sum_lanes(f32x16 value) {
  return fold_lanes(value, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return a + b; });
}

FASTVIT_INLINE float max_lanes(f32x16 value) {
  return fold_lanes(value, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// Transpose a 16 x 16 tile: four perfect shuffles of its rows rotate the index bits (row, column) into (column, row).
FASTVIT_INLINE void transpose16(f32x16 (&tile)[LANES]) {
  for (int round = 0; round < 4; ++round) {
    f32x16 shuffled[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      const f32x16 a = tile[i], b = tile[i + LANES / 2];
      shuffled[2 * i] = FASTVIT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      shuffled[2 * i + 1] = FASTVIT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) tile[i] = shuffled[i];
  }
}

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
  f32x16 value = p * from_bits(power);
  value = x < -87.3f ? f32x16{} : value;
  return x > 88.3f ? splat(std::numeric_limits<float>::infinity()) : value;
}

}  // namespace fastvit::cpu
