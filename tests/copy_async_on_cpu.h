// csrc/cuda/copy_async.cuh for cuda_on_cpu.h: a copy is made as late as a GPU may make it, or at once.
#pragma once

#include <cstdlib>
#include <deque>
#include <map>
#include <utility>
#include <vector>

namespace fastvit {

using Copies = std::vector<std::pair<uint4*, const uint4*>>;
inline std::map<const void*, std::deque<Copies>> groups_of;  // by thread; the last group is not complete

inline std::deque<Copies>& my_groups() {
  std::deque<Copies>& groups = groups_of[cuda_on_cpu::current];
  if (groups.empty()) groups.emplace_back();
  return groups;
}

inline void copy_async(uint4* shared, const uint4* global) {
  if (std::getenv("FASTVIT_CUDA_ON_CPU_COPIES_AT_ONCE") != nullptr) {
    *shared = *global;
  } else {
    my_groups().back().emplace_back(shared, global);
  }
}

inline void end_group_of_copies() { my_groups().emplace_back(); }

template <int GROUPS>
inline void wait_for_copies_before() {
  std::deque<Copies>& groups = my_groups();
  while (int(groups.size()) - 1 > GROUPS) {
    for (const auto& [shared, global] : groups.front()) *shared = *global;
    groups.pop_front();
  }
}

}  // namespace fastvit
