#include "linear.h"

namespace fastvit::cpu {
namespace {

constexpr int64_t MAX_BLOCK_ROWS = 112;  // rows that share one pass over a weight panel
constexpr int64_t MIN_BLOCK_ROWS = 16;
constexpr int64_t PANEL_LOAD_ROWS = 12;  // reading a panel costs about as much as multiplying this many rows by it

}  // namespace

int64_t plan_row_blocks(int64_t rows) {
  const int64_t threads = at::get_num_threads();
  const int64_t blocks = std::max(round_up(ceil_div(rows, MAX_BLOCK_ROWS), threads), threads);
  return std::min(blocks, ceil_div(rows, MIN_BLOCK_ROWS));
}

// With few rows the columns are split too: take the grid whose longest thread has the least to do.
Grid plan_grid(int64_t rows, int64_t panels) {
  const int64_t threads = at::get_num_threads(), fewest = ceil_div(rows, MAX_BLOCK_ROWS);
  if (fewest >= threads) return {round_up(fewest, threads), 1};
  Grid best{fewest, 1};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t blocks = fewest; blocks <= std::min(threads, ceil_div(rows, MIN_BLOCK_ROWS)); ++blocks) {
    for (int64_t groups = 1; groups <= std::min(threads, panels); ++groups) {
      const int64_t rounds = ceil_div(blocks * groups, threads);
      const int64_t cost = rounds * (ceil_div(rows, blocks) + PANEL_LOAD_ROWS) * (ceil_div(panels, groups) + 1);
      if (cost < best_cost) {
        best = {blocks, groups};
        best_cost = cost;
      }
    }
  }
  return best;
}

}  // namespace fastvit::cpu
