// What is the same for all calls of a block of one kind, as fastvit/block_plan/hopper.py packs it into a tensor of
// bytes.
#pragma once

#include <cstring>

#include "cuda/checks.h"
#include "cuda/compiled_kernel.h"

namespace fastvit::sm90 {

template <class Plan>
Plan read_plan(const Checks& checks, const Tensor& plan) {
  Plan read;
  checks.expect(plan.is_cpu() && plan.numel() == int64_t(sizeof read) && plan.is_contiguous(), [&] {
    return "plan has " + std::to_string(plan.numel()) + " bytes, expected " + std::to_string(sizeof read);
  });
  std::memcpy(&read, plan.data_ptr(), sizeof read);
  return read;
}

}  // namespace fastvit::sm90
