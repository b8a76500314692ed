// Whether a thread's values in the small tile's epilogue (linear_act_grad.cuh) lie where ColumnSums takes them to be:
// by CUTLASS's own types, in the steps of its epilogue's store(). Prints what differs.
#include <cstdio>

#include "cuda/sm90/linear_act_grad.cuh"
#include "hopper_layouts.h"

using namespace cute;
using namespace fastvit::sm90;

using Traits = LinearActGradTraits<fastvit::DType::kBFloat16, fastvit::sm90::Tile::kSmall>;
using Epilogue = typename Traits::Product::Epilogue;
using TiledMma = typename Traits::Product::MainLoop::TiledMma;
using EpilogueTile = typename Epilogue::EpilogueTile;
using Sums = ColumnSums<Traits::kSize.cols>;

int differ(const char* what, int count) {
  if (count > 0) std::printf("%s: %d\n", what, count);
  return count;
}

int main() {
  const auto tile = Shape<Int<Traits::kSize.rows>, Int<Traits::kSize.cols>>{};
  const auto places = make_identity_tensor(tile);
  const auto copy = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, typename Epilogue::ElementD>{},
                                      make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, TiledMma{}));
  int first = 0, relative = 0, accumulators = 0, sums = 0;
  bool seen[Traits::kSize.rows][Traits::kSize.cols] = {};
  for (int thread = 0; thread < int(size(TiledMma{})); ++thread) {
    auto values = partition_fragment_C(TiledMma{}, tile);  // each is its place
    const auto of_values = TiledMma{}.get_slice(thread).partition_C(places);
    for (int i = 0; i < int(size(values)); ++i) values(i) = 1000 * get<0>(of_values(i)) + get<1>(of_values(i));

    const auto of_thread = copy.get_slice(thread);
    const auto held = of_thread.retile_S(values);
    const auto absolute = of_thread.partition_S(flat_divide(places, EpilogueTile{}));
    const auto coordinates = make_coord_tensor(absolute.layout());
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = 2 * (lane % 4);
    first += get<0>(absolute(0)) != row || get<1>(absolute(0)) != column;

    const int product_cols = size<1>(tile) / size<2>(held), cols = size<1>(EpilogueTile{});
    for (int epi_n = 0; epi_n < int(size<4>(absolute)); ++epi_n) {
      for (int epi_m = 0; epi_m < int(size<3>(absolute)); ++epi_m) {
        const auto at = absolute(_, _, _, epi_m, epi_n);
        const auto from_first = coordinates(_, _, _, epi_m, epi_n);
        const int before = epi_n % (product_cols / cols) * int(size(at));
        for (int i = 0; i < int(size(at)); ++i) {
          const int down = get<0>(at(i)), along = get<1>(at(i));
          seen[down][along] = true;
          relative += get<0>(from_first(i)) != down - row || get<1>(from_first(i)) != along - column;
          accumulators += held(before + i, epi_m, epi_n * cols / product_cols) != 1000 * down + along;
          // column_sums.cpp goes on from here
          const auto place = hopper_on_cpu::accumulator_place(down % 16, along % Sums::kColumns);
          sums += along / Sums::kColumns != epi_n || down / 16 % 4 != thread / 32 || place.lane != lane;
        }
      }
    }
  }
  int missing = 0;
  for (const auto& row : seen) {
    for (const bool was : row) missing += !was;
  }
  return differ("first places", first) + differ("relative coordinates", relative) +
             differ("accumulators", accumulators) + differ("places of sums", sums) + differ("missing", missing) >
         0;
}
