// What block.cpp and block_bwd.cpp share. A plan is what is the same for all calls of a block of one kind, as
// fastvit/block_plan/hopper.py packs it into a tensor of bytes.
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

// A block's parameters, in the order of fastvit/block_plan/plan.py.
struct Weights {
  const MaybeTensor &norm1_weight, &norm1_bias;
  const Tensor& qkv_weight;
  const MaybeTensor& qkv_bias;
  const Tensor& proj_weight;
  const MaybeTensor &proj_bias, &layer_scale1, &norm2_weight, &norm2_bias;
  const Tensor& fc1_weight;
  const MaybeTensor& fc1_bias;
  const Tensor& fc2_weight;
  const MaybeTensor &fc2_bias, &layer_scale2;
};

#define FASTVIT_BLOCK_WEIGHTS                                                                              \
  "Tensor? norm1_weight, Tensor? norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight,"     \
  " Tensor? proj_bias, Tensor? layer_scale1, Tensor? norm2_weight, Tensor? norm2_bias, Tensor fc1_weight," \
  " Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale2"

}  // namespace fastvit::sm90
