#include "fingerprint.h"

#include <cstring>

namespace fastvit::cpu {
namespace {

constexpr int64_t SAMPLED_LINES = 256;

// Four vectors of the smallest size that every machine has: a line costs less than fetching it.
using Words = uint32_t __attribute__((vector_size(16)));

// One-at-a-time hashes side by side. Each step is a bijection of the value and of the state: one change always shows.
struct LineHash {
  Words state[4] = {};

  void add(const char* line) {
    for (int i = 0; i < 4; ++i) {
      Words words;
      std::memcpy(&words, line + i * sizeof(Words), sizeof(Words));
      words += state[i];
      words += words << 10;
      state[i] = words ^ words >> 6;
    }
  }

  // Bytes behind the last whole line are padded with zeros.
  void add(const char* bytes, int64_t count) {
    int64_t i = 0;
    for (; i + CACHE_LINE <= count; i += CACHE_LINE) add(bytes + i);
    if (i == count) return;
    char rest[CACHE_LINE] = {};
    std::memcpy(rest, bytes + i, count - i);
    add(rest);
  }

  uint64_t value() const {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const Words& words : state) {
      for (int i = 0; i < 4; ++i) {
        hash = (hash ^ words[i]) * 0x100000001b3u;
        hash ^= hash >> 29;
      }
    }
    return hash;
  }
};

// A matrix as runs of values that lie side by side: its rows, or its columns where those do.
struct Runs {
  const char* data;
  int64_t count, bytes, stride;  // of a run, in bytes
  int64_t step, item;            // between values of a run; the size of one

  explicit Runs(const at::Tensor& weight) : data(static_cast<const char*>(weight.const_data_ptr())) {
    const int64_t along = weight.stride(0) == 1 && weight.stride(1) != 1 ? 0 : 1;
    item = weight.element_size();
    count = weight.size(1 - along);
    bytes = weight.size(along) * item;
    stride = weight.stride(1 - along) * item;
    step = weight.stride(along) * item;
  }

  int64_t lines() const { return ceil_div(bytes, CACHE_LINE); }

  // `size` bytes of run `i` from `first` on.
  void add_to(LineHash& hash, int64_t i, int64_t first, int64_t size) const {
    const char* run = data + i * stride;
    if (step == item) return hash.add(run + first, size);
    for (int64_t at = first; at < first + size; at += CACHE_LINE) {
      char line[CACHE_LINE] = {};
      for (int64_t j = 0; j < std::min(CACHE_LINE, first + size - at); j += item) {
        std::memcpy(line + j, run + (at + j) / item * step, item);
      }
      hash.add(line);
    }
  }
};

uint64_t hash_lines(const Runs& runs) {
  LineHash hash;
  for (int64_t i = 0; i < SAMPLED_LINES; ++i) {
    const int64_t first = i % runs.lines() * CACHE_LINE;
    runs.add_to(hash, runs.count * i / SAMPLED_LINES, first, std::min(CACHE_LINE, runs.bytes - first));
  }
  return hash.value();
}

uint64_t hash_slice(const Runs& runs, int64_t slice) {
  LineHash hash;
  const Range lines = piece(runs.count * runs.lines(), SLICES, slice);
  for (int64_t line = lines.begin; line < lines.end;) {
    const int64_t i = line / runs.lines(), first = line % runs.lines() * CACHE_LINE;
    const int64_t count = std::min(lines.end - line, runs.lines() - line % runs.lines());
    runs.add_to(hash, i, first, std::min(count * CACHE_LINE, runs.bytes - first));
    line += count;
  }
  return hash.value();
}

}  // namespace

Fingerprint::Fingerprint(const at::Tensor& weight) {
  const Runs runs(weight);
  lines_ = hash_lines(runs);
  parallel_tasks(SLICES, [&](int64_t i) { slices_[i] = hash_slice(runs, i); });
}

bool Fingerprint::matches(const at::Tensor& weight, int64_t first, int64_t count) const {
  const Runs runs(weight);
  if (hash_lines(runs) != lines_) return false;
  for (int64_t i = 0; i < std::min(count, SLICES); ++i) {
    const int64_t slice = (first + i) % SLICES;
    if (hash_slice(runs, slice) != slices_[slice]) return false;
  }
  return true;
}

}  // namespace fastvit::cpu
