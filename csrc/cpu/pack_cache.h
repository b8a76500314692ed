// Packed weights kept between calls.
//
// An entry belongs to a storage, held by a weak reference: while that is held its address cannot be reused. It is valid
// while the storage lives, its data pointer and the version counter are unchanged (inference tensors have none), and
// its values are: `p.data.copy_()` writes without counting a version, see fingerprint.h for what is looked at.
#pragma once

#include <ATen/ATen.h>

#include <memory>

#include "gemm.h"

namespace fastvit::cpu {

using PackedWeightPtr = std::shared_ptr<const PackedWeight>;

// The (N, K) weight packed for x W^T: from the cache or into it when `cache`, else packed for this call only.
// rows  of x: the more of them are multiplied, the more of the weight is looked at before
PackedWeightPtr packed_weight(const at::Tensor& weight, bool cache, int64_t rows = 0);

struct PackCacheInfo {
  int64_t entries, bytes;
};
// Of everything that is kept, or of the packs of this tensor's storage.
PackCacheInfo pack_cache_info(const std::optional<at::Tensor>& weight = {});
void clear_pack_cache();

}  // namespace fastvit::cpu
