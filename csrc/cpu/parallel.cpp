#include "parallel.h"

#include <c10/util/Exception.h>

#include <memory>
#include <new>
#include <vector>

namespace fastvit::cpu {
namespace {

struct AlignedDelete {
  void operator()(void* data) const { ::operator delete(data, std::align_val_t{CACHE_LINE}); }
};

struct Buffer {
  std::unique_ptr<void, AlignedDelete> data;
  int64_t bytes = 0;
};

struct ThreadBuffers {
  std::vector<Buffer> slots;
  bool in_use = false;
};

thread_local ThreadBuffers buffers;

}  // namespace

Scratch::Scratch() {
  TORCH_INTERNAL_ASSERT(!buffers.in_use, "two Scratch objects live on one thread");
  buffers.in_use = true;
}

Scratch::~Scratch() { buffers.in_use = false; }

void* Scratch::next(int64_t bytes) {
  if (used_ == buffers.slots.size()) buffers.slots.emplace_back();
  Buffer& buffer = buffers.slots[used_++];
  if (buffer.bytes < bytes) {
    buffer.data.reset();
    buffer.data.reset(::operator new(bytes, std::align_val_t{CACHE_LINE}));
    buffer.bytes = bytes;
  }
  return buffer.data.get();
}

}  // namespace fastvit::cpu
