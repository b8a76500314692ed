#include "pack_cache.h"

#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

#include "fingerprint.h"

namespace fastvit::cpu {
namespace {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

// Which view of which storage, packed for which GEMM.
using Key =
    std::tuple<const c10::StorageImpl*, int64_t, int64_t, int64_t, int64_t, int64_t, at::ScalarType, at::ScalarType>;

constexpr int64_t ROWS_PER_SLICE = 128;  // multiplying by these costs 200 times as much as hashing a slice

struct Entry {
  WeakStorage storage;
  const void* data;
  int64_t version;
  Fingerprint fingerprint;
  PackedWeightPtr pack;
  mutable std::atomic<int64_t> next_slice{0};

  bool matches(const at::Tensor& weight, int64_t rows) const;
};
using EntryPtr = std::shared_ptr<const Entry>;

struct Cache {
  std::mutex mutex;
  std::map<Key, EntryPtr> entries;

  void drop_expired() {
    std::erase_if(entries, [](const auto& item) { return item.second->storage.expired(); });
  }

  EntryPtr find(const Key& key) {
    const std::lock_guard lock(mutex);
    const auto found = entries.find(key);
    return found == entries.end() ? nullptr : found->second;
  }

  void insert(const Key& key, EntryPtr entry) {
    const std::lock_guard lock(mutex);
    drop_expired();
    entries.insert_or_assign(key, std::move(entry));
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

int64_t version_of(const at::Tensor& weight) {
  return weight.is_inference() ? -1 : static_cast<int64_t>(weight._version());
}

bool Entry::matches(const at::Tensor& weight, int64_t rows) const {
  if (storage.expired() || data != weight.const_data_ptr() || version != version_of(weight)) return false;
  const int64_t slices = std::clamp<int64_t>(rows / ROWS_PER_SLICE, 1, SLICES);
  return fingerprint.matches(weight, next_slice.fetch_add(slices) % SLICES, slices);
}

}  // namespace

PackedWeightPtr packed_weight(const at::Tensor& weight, bool cache, int64_t rows) {
  if (!cache) return std::make_shared<const PackedWeight>(pack_weight(weight));
  const Key key = key_of(weight);
  Cache& packs = cache_instance();
  if (const EntryPtr found = packs.find(key); found && found->matches(weight, rows)) return found->pack;
  // Version and values are taken before packing: a write during it makes the entry stale, never the other way round.
  const int64_t version = version_of(weight);
  const Fingerprint fingerprint(weight);
  auto pack = std::make_shared<const PackedWeight>(pack_weight(weight));
  auto entry = std::make_shared<const Entry>(weight.storage().getWeakStorageImpl(), weight.const_data_ptr(), version,
                                             fingerprint, pack);
  packs.insert(key, std::move(entry));
  return pack;
}

PackCacheInfo pack_cache_info(const std::optional<at::Tensor>& weight) {
  const auto* storage = weight ? weight->storage().unsafeGetStorageImpl() : nullptr;
  Cache& packs = cache_instance();
  const std::lock_guard lock(packs.mutex);
  packs.drop_expired();
  PackCacheInfo info{0, 0};
  for (const auto& [key, entry] : packs.entries) {
    if (storage && std::get<0>(key) != storage) continue;
    info.entries += 1;
    info.bytes += entry->pack->bytes();
  }
  return info;
}

void clear_pack_cache() {
  Cache& packs = cache_instance();
  const std::lock_guard lock(packs.mutex);
  packs.entries.clear();
}

}  // namespace fastvit::cpu
