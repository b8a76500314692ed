#include "pack_cache.h"

#include <c10/util/intrusive_ptr.h>

#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

namespace fastvit::cpu {
namespace {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

// Which view of which storage, packed for which GEMM.
using Key =
    std::tuple<const c10::StorageImpl*, int64_t, int64_t, int64_t, int64_t, int64_t, at::ScalarType, at::ScalarType>;

// What must be unchanged for a pack to be right.
struct Stamp {
  const void* data;
  int64_t version;
  uint64_t fingerprint;
  bool operator==(const Stamp&) const = default;
};

struct Entry {
  WeakStorage storage;
  Stamp stamp;
  PackedWeightPtr pack;
};

struct Cache {
  std::mutex mutex;
  std::map<Key, Entry> entries;

  void drop_expired() {
    std::erase_if(entries, [](const auto& item) { return item.second.storage.expired(); });
  }
};

// Leaked on purpose: weights may outlive static destructors.
Cache& cache_instance() {
  static auto* cache = new Cache;
  return *cache;
}

Key key_of(const at::Tensor& weight) {
  return {weight.storage().unsafeGetStorageImpl(),
          weight.storage_offset(),
          weight.size(0),
          weight.size(1),
          weight.stride(0),
          weight.stride(1),
          weight.scalar_type(),
          compute_dtype(weight.scalar_type())};
}

// Hash of about 1,000 elements spread over every row and column: an odd step visits all columns before it repeats.
uint64_t fingerprint(const at::Tensor& weight) {
  constexpr int64_t SAMPLES = 1024;
  const int64_t total = weight.numel(), columns = weight.size(1), item = weight.element_size();
  const int64_t step = std::max<int64_t>(1, total / SAMPLES) | 1;
  const auto* base = static_cast<const char*>(weight.const_data_ptr());
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&](int64_t i) {
    uint32_t value = 0;
    std::memcpy(&value, base + (i / columns * weight.stride(0) + i % columns * weight.stride(1)) * item, item);
    hash = (hash ^ value) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  for (int64_t i = 0; i < total; i += step) mix(i);
  mix(total - 1);
  return hash;
}

Stamp stamp_of(const at::Tensor& weight) {
  return {weight.const_data_ptr(), weight.is_inference() ? -1 : static_cast<int64_t>(weight._version()),
          fingerprint(weight)};
}

}  // namespace

PackedWeightPtr packed_weight(const at::Tensor& weight, bool cache) {
  if (!cache) return std::make_shared<const PackedWeight>(pack_weight(weight));
  // The stamp is taken before packing: a write during it makes the entry stale, never the other way round.
  const Key key = key_of(weight);
  const Stamp stamp = stamp_of(weight);
  Cache& packs = cache_instance();
  {
    const std::lock_guard lock(packs.mutex);
    const auto found = packs.entries.find(key);
    if (found != packs.entries.end() && !found->second.storage.expired() && found->second.stamp == stamp) {
      return found->second.pack;
    }
  }
  auto pack = std::make_shared<const PackedWeight>(pack_weight(weight));
  const std::lock_guard lock(packs.mutex);
  packs.drop_expired();
  packs.entries.insert_or_assign(key, Entry{weight.storage().getWeakStorageImpl(), stamp, pack});
  return pack;
}

PackCacheInfo pack_cache_info() {
  Cache& packs = cache_instance();
  const std::lock_guard lock(packs.mutex);
  packs.drop_expired();
  PackCacheInfo info{static_cast<int64_t>(packs.entries.size()), 0};
  for (const auto& [key, entry] : packs.entries) info.bytes += entry.pack->bytes();
  return info;
}

void clear_pack_cache() {
  Cache& packs = cache_instance();
  const std::lock_guard lock(packs.mutex);
  packs.entries.clear();
}

}  // namespace fastvit::cpu
