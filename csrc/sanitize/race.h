// Tasks that share a counter without a guard: ThreadSanitizer has to report it, or its silence says nothing.
#pragma once

#include <chrono>
#include <thread>

#include "../cpu/parallel.h"

namespace fastvit {

inline int64_t count_with_a_race(int64_t tasks) {
  int64_t count = 0;
  cpu::parallel_tasks(tasks, [&](int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // no thread may take all tasks
    ++count;
  });
  return count;
}

}  // namespace fastvit
