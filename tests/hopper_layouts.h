// Where wgmma's operands and results lie, by the PTX manual: in shared memory, and in the threads of a warp.
// hopper_layouts.cpp compares this with CUTLASS.
#pragma once

#include <cstdint>

namespace hopper_on_cpu {

// PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout". A descriptor has the start in bits 0-13, the
// leading dimension's offset in 16-29, the stride dimension's in 32-45, all in units of 16 bytes, the base offset in
// 49-51 and the swizzle in 62-63. With 128 bytes of swizzle, a pattern is 8 rows of 128 bytes, in which the 16-byte
// piece of a row is the one its number says, exclusive-or the row's number.
inline uint32_t swizzle128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline uint32_t operand_address(uint64_t descriptor, bool k_is_fastest, int mn, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const int fast = k_is_fastest ? k : mn, slow = k_is_fastest ? mn : k;  // along a row of 128 bytes, and across rows
  uint32_t address = start + slow / 8 * stride + slow % 8 * 128 + fast % 64 * 2;
  if (!k_is_fastest) address += fast / 64 * leading;  // one that is k-fastest has at most 64 columns: 16 of them here
  return swizzle128(address);
}

// Fragments: PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16". Which thread of the warp holds an element, and
// as which of its values; rows are the warp's 16.
struct Place {
  int lane, value;
};
inline Place accumulator_place(int row, int n) { return {row % 8 * 4 + n % 8 / 2, n / 8 * 4 + row / 8 * 2 + n % 2}; }
inline Place fragment_place(int row, int k) { return {row % 8 * 4 + k % 8 / 2, k / 8 * 4 + row / 8 * 2 + k % 2}; }

}  // namespace hopper_on_cpu
