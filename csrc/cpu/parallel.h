// Threads: a queue of tasks over PyTorch's pool, and scratch memory that each thread keeps.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace fastvit::cpu {

constexpr int64_t CACHE_LINE = 64;
constexpr int64_t LANES = 16;  // floats that vector code takes at a time
constexpr int64_t PANEL = 64;  // columns of a GEMM's tile

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Call task(i) for 0 <= i < count. Threads take the next free task, so that a thread which is slowed down takes fewer.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// Piece `i` of `count` nearly equal pieces of [0, total).
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range piece(int64_t total, int64_t count, int64_t i) { return {total * i / count, total * (i + 1) / count}; }

// Buffers that each thread keeps between calls. One Scratch a thread at a time; contents start undefined.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(next(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* next(int64_t bytes);
  size_t used_ = 0;
};

}  // namespace fastvit::cpu
