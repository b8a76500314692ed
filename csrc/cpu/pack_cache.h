// Packed weights kept between calls, never served stale.
//
// An entry belongs to a storage, held by a weak reference: while that is held its address cannot be reused. It is valid
// while the storage lives, its data pointer and the version counter are unchanged (inference tensors have none), and a
// hash of samples of the values is unchanged, since `p.data.copy_()` writes without counting a version.
#pragma once

#include <ATen/ATen.h>

#include <memory>

#include "gemm.h"

namespace fastvit::cpu {

using PackedWeightPtr = std::shared_ptr<const PackedWeight>;

// The (N, K) weight packed for x W^T: from the cache or into it when `cache`, else packed for this call only.
PackedWeightPtr packed_weight(const at::Tensor& weight, bool cache);

struct PackCacheInfo {
  int64_t entries, bytes;
};
PackCacheInfo pack_cache_info();
void clear_pack_cache();

}  // namespace fastvit::cpu
