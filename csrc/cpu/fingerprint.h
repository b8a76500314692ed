// What tells a changed weight from an unchanged one when no version was counted: hashes of its values.
//
// Hashing all of a weight at each call would cost up to a third of a forward of one image, since its product reads the
// same bytes. So a call hashes 256 cache lines, spread over all rows and all columns, and one or more of 64 slices in
// turn. Seen at once: whatever changes all values, a column or one value in fifty. Anything else: when its slice's turn
// comes.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "parallel.h"

namespace fastvit::cpu {

constexpr int64_t SLICES = 64;

class Fingerprint {
 public:
  // Hashes everything.
  explicit Fingerprint(const at::Tensor& weight);
  // Are the sampled lines and these `count` slices, from `first` on and round, what they were?
  bool matches(const at::Tensor& weight, int64_t first, int64_t count) const;

 private:
  uint64_t lines_;
  std::array<uint64_t, SLICES> slices_;
};

}  // namespace fastvit::cpu
