// Whether the layouts of hopper_layouts.h are those that CUTLASS builds and describes. Prints what differs.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include "hopper_layouts.h"

#include <cstdio>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using Element = cutlass::bfloat16_t;

constexpr int kRows = 208, kColumns = 64;
constexpr uint64_t kEightRows = uint64_t(1024 / 16) << 32, kSwizzle = uint64_t(1) << 62;

int differ(const char* what, int count) {
  if (count > 0) std::printf("%s: %d\n", what, count);
  return count;
}

// A tile in rows of 128 bytes, read with the row or the column running fastest.
int operands() {
  const auto by_rows = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<kRows>, Int<kColumns>>{});
  const auto by_columns =
      tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<kColumns>, Int<kRows>>{});
  const auto k_fastest = as_position_independent_swizzle_layout(by_rows);
  const auto mn_fastest = as_position_independent_swizzle_layout(by_columns);
  int first = 0, second = 0;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      const uint64_t step = kSwizzle | kEightRows | (column / 16 * 32) >> 4;
      const uint64_t rows = kSwizzle | kEightRows | (row / 16 * 2048) >> 4;
      first += hopper_on_cpu::operand_address(step, true, row, column % 16) != uint32_t(k_fastest(row, column)) * 2;
      second += hopper_on_cpu::operand_address(rows, false, column, row % 16) != uint32_t(mn_fastest(column, row)) * 2;
    }
  }
  // two slices of 64 columns, one behind the other
  const auto sliced = as_position_independent_swizzle_layout(tile_to_shape(
      SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, Shape<Int<2 * kColumns>, Int<kRows>>{}, Step<_2, _1>{}));
  int third = 0;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < 2 * kColumns; ++column) {
      const uint64_t slice = uint64_t(kRows * 128 / 16) << 16;
      const uint64_t rows = kSwizzle | kEightRows | slice | (row / 16 * 2048) >> 4;
      third += hopper_on_cpu::operand_address(rows, false, column, row % 16) != uint32_t(sliced(column, row)) * 2;
    }
  }
  return differ("operands, k fastest", first) + differ("operands, n fastest", second) + differ("slices", third);
}

int fragments() {
  using Scores = MMA_Traits<SM90_64x208x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>>;
  using Out = MMA_Traits<SM90_64x64x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>>;
  const typename Scores::CLayout d;
  const typename Out::ALayout a;
  int first = 0, second = 0;
  for (int thread = 0; thread < 128; ++thread) {
    const auto wrong = [&](int place, int value, hopper_on_cpu::Place (*ours)(int, int)) {
      const int row = place % 64, column = place / 64;
      const hopper_on_cpu::Place at = ours(row % 16, column);
      return row / 16 * 32 + at.lane != thread || at.value != value;
    };
    for (int i = 0; i < 104; ++i) first += wrong(d(thread, i), i, hopper_on_cpu::accumulator_place);
    for (int i = 0; i < 8; ++i) second += wrong(a(thread, i), i, hopper_on_cpu::fragment_place);
  }
  return differ("accumulators", first) + differ("fragments of a", second);
}

int main() { return operands() + fragments() > 0; }
