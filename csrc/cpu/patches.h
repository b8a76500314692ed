// Where the pixels of a patch lie in the images, and what normalising does to them: pixel * scale + shift.
#pragma once

#include "../common.h"

namespace fastvit::cpu {

struct Patches {
  Tensor images;                         // (B, C, IH, IW)
  int64_t height, width, rows, columns;  // of a patch, and of the grid
  std::vector<float> scale, shift;       // (C)

  Patches(const Tensor& images, const Tensor& weight, const OptionalTensor& mean, const OptionalTensor& std);

  int64_t per_image() const { return rows * columns; }
  int64_t count() const { return images.size(0) * per_image(); }
  int64_t pixels() const { return images.size(1) * height * width; }
  // First pixel of patch `i` in elements.
  int64_t origin(int64_t i) const {
    const int64_t patch = i % per_image();
    return i / per_image() * images.stride(0) + patch / columns * height * images.stride(2) +
           patch % columns * width * images.stride(3);
  }
};

// Patch `i` normalised, in float32; `out` has room for 16 values more.
void gather_patch(const Patches& patches, int64_t i, float* out);

}  // namespace fastvit::cpu
