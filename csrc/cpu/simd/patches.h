// Patches gathered from images and normalised; see ../patches.h.
#pragma once

#include "vector.h"

namespace fastvit::cpu::FASTVIT_ISA {

// One row of a patch's pixels after the other. A row may write up to 15 values past its end, which the next overwrites.
template <class S>
FASTVIT_INLINE void gather_patch_as(const Patches& patches, int64_t i, float* out) {
  const Tensor& images = patches.images;
  const int64_t channel = images.stride(1), line = images.stride(2), pixel = images.stride(3);
  const S* patch = static_cast<const S*>(images.const_data_ptr()) + patches.origin(i);
  for (int64_t c = 0; c < images.size(1); ++c) {
    const float scale = patches.scale[c], shift = patches.shift[c];
    for (int64_t y = 0; y < patches.height; ++y, out += patches.width) {
      const S* src = patch + c * channel + y * line;
      for (int64_t x = 0; x < patches.width; x += LANES) {
        const int64_t count = std::min(LANES, patches.width - x);
        if (pixel == 1) {
          store16(out + x, load_part(src + x, count) * scale + shift);
          continue;
        }
        S spread[LANES] = {};
        for (int64_t j = 0; j < count; ++j) spread[j] = src[(x + j) * pixel];
        store16(out + x, load16(spread) * scale + shift);
      }
    }
  }
}

// Patch `i` normalised, in float32; `out` has room for 16 values more.
void gather_patch(const Patches& patches, int64_t i, float* out) {
  switch (patches.images.scalar_type()) {
    case at::kByte:
      return gather_patch_as<uint8_t>(patches, i, out);
    case at::kBFloat16:
      return gather_patch_as<c10::BFloat16>(patches, i, out);
    case at::kHalf:
      return gather_patch_as<c10::Half>(patches, i, out);
    default:
      return gather_patch_as<float>(patches, i, out);
  }
}

}  // namespace fastvit::cpu::FASTVIT_ISA
