// Whether ColumnSums adds every value of a tile once, and to its own column. Prints what differs.
#include "cuda_on_cpu.h"
// after it
#include "cuda/sm90/column_sums.cuh"
#include "hopper_layouts.h"

using Sums = fastvit::sm90::ColumnSums<128>;

constexpr int kRows = 128, kThreads = 128, kSubtileRows = 64;

// Powers of two whose sums are exact, but for a share of each that tells the columns apart
float value(int row, int column) { return float(1 << row % 16) + float(column); }

void kernel(float* sums) {
  __shared__ Sums::Storage storage;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  Sums mine;
  for (int first = 0; first < 128; first += Sums::kColumns) {
    for (int below = 0; below < kRows; below += kSubtileRows) {
      for (int row = 0; row < 16; ++row) {  // of the warp
        for (int column = 0; column < Sums::kColumns; ++column) {
          if (hopper_on_cpu::accumulator_place(row, column).lane != lane) continue;
          mine.add(column - lane % 4 * 2, value(below + 16 * warp + row, first + column));
        }
      }
    }
    mine.fold(storage, thread, first);
  }
  __syncthreads();
  Sums::finish(storage, thread, sums);
}

int main() {
  std::vector<float> sums(128, NAN);
  cuda_on_cpu::launch(dim3(1), dim3(kThreads), [&] { kernel(sums.data()); });
  int wrong = 0;
  for (int column = 0; column < 128; ++column) {
    double expected = 0;
    for (int row = 0; row < kRows; ++row) expected += value(row, column);
    wrong += sums[column] != expected;
  }
  if (wrong > 0) std::printf("columns: %d\n", wrong);
  return wrong > 0;
}
