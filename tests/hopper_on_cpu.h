// csrc/cuda/sm90/hopper.cuh on the CPU: the same functions, on the model of hopper_model.h.
#pragma once

#include "hopper_model.h"

namespace fastvit::sm90::hopper {

namespace cpu = hopper_on_cpu;

inline char* shared_memory() { return cpu::shared + cpu::kFirstAddress; }
inline uint32_t shared_address(const void* p) { return cpu::address_of(p); }

template <typename T>
T shuffle(T v, int from) {
  static_assert(sizeof(T) == 4);
  cpu::Warp& w = cpu::warp();
  const int of_lane = cpu::thread() % cpu::kLanes, number = cpu::lane().shuffles++;
  std::memcpy(&w.exchanged[number % 2][of_lane], &v, 4);
  cpu::leave_until([&w, number] {  // the last one too: then all go on from here, in turn
    for (const cpu::Lane& lane : w.lanes) {
      if (lane.shuffles <= number) return false;
    }
    return true;
  });
  std::memcpy(&v, &w.exchanged[number % 2][from], 4);
  return v;
}
template <typename T>
T shuffle_xor(T v, int mask) {
  return shuffle(v, cpu::thread() % cpu::kLanes ^ mask);
}
inline void sync_warp() { shuffle_xor(0.f, 0); }

inline float exp2(float v) { return std::exp2(v); }
inline float log2(float v) { return std::log2(v); }

struct Barrier {
  uint64_t word;
  void init(int count) { cpu::block->barriers[this] = {count, count}; }
  void arrive() {
    if (!cpu::without("arrive")) cpu::arrive(this, 0);
  }
  void arrive_and_expect(uint32_t bytes) { cpu::arrive(this, bytes); }
  void wait(uint32_t parity) {
    if (cpu::without("wait")) return;
    cpu::facts_of(this);
    cpu::wait_until([this, parity] { return cpu::facts_of(this).phase != parity; });
  }
};
inline void show_barriers() {}

inline void named_arrive(int name, int threads) {
  if (cpu::without("named_arrive")) return;
  cpu::expect(name < 8 && threads % cpu::kLanes == 0, "a barrier by a name that there is not");  // CUTLASS has 8 of 16
  cpu::NamedFacts& facts = cpu::block->named[name];
  if (++facts.arrived == threads) facts.arrived = 0, ++facts.generation;
}
inline void named_sync(int name, int threads) {
  if (cpu::without("named_sync")) return;
  const int before = cpu::block->named[name].generation;
  named_arrive(name, threads);
  cpu::wait_until([name, before] { return cpu::block->named[name].generation != before; });
}
inline void sync_block() {
  if (!cpu::without("sync_block")) named_sync(-1, int(cuda_on_cpu::block_size.x));
}

template <int COUNT>
void take_registers() {
  cpu::change_registers(COUNT);
}
template <int COUNT>
void give_registers() {
  if (!cpu::without("give_registers")) cpu::change_registers(COUNT);
}

inline void load_tile(const CUtensorMap& map, Barrier& full, void* to, int c0, int c1, int c2, int c3) {
  cpu::Load load{{}, &full, static_cast<char*>(to), {c0, c1, c2, c3}, cpu::due()};
  std::memcpy(&load.map, &map, sizeof(load.map));
  cpu::expect(cpu::address_of(to) % 1024 == 0, "a swizzled tile that does not start at a multiple of 1024 bytes");
  cpu::facts_of(&full);
  std::memset(cpu::at_address(cpu::address_of(to), int(cpu::box_bytes(load.map))), 0xff, cpu::box_bytes(load.map));
  cpu::block->loads.push_back(load);
}
inline void prefetch_map(const CUtensorMap&) {}

inline void products_begin() { cpu::lane().fenced = !cpu::without("products_begin"); }
inline void products_commit() {
  if (cpu::without("products_commit")) return;
  ++cpu::lane().groups, cpu::lane().open = false;
}
template <int LATEST>
void products_wait() {
  if (cpu::without("products_wait")) return;
  cpu::wait_for_groups(LATEST);
}
template <int N>
void pin(float (&)[N]) {}

template <typename T, int N>
void multiply(float* d, uint64_t a, uint64_t b, bool add) {
  cpu::issue(cpu::Operands::kAlong, d, N, a, nullptr, b, add, std::is_same_v<T, __nv_bfloat16>);
}
template <typename T, int N>
void multiply(float* d, const uint32_t* a, uint64_t b, bool add) {
  cpu::issue(cpu::Operands::kRegisters, d, N, 0, a, b, add, std::is_same_v<T, __nv_bfloat16>);
}
template <typename T, int N>
void multiply_across(float* d, uint64_t a, uint64_t b, bool add) {
  cpu::issue(cpu::Operands::kAcross, d, N, a, nullptr, b, add, std::is_same_v<T, __nv_bfloat16>);
}

// PTX ISA, stmatrix: a thread's word of a matrix belongs to row lane / 4, and has two of its columns.
inline void store_matrices(void* row, const uint32_t* words) {
  const uint32_t address = cpu::address_of(row), of_lane = cpu::thread() % cpu::kLanes;
  cpu::expect(address % 16 == 0, "a matrix's row that does not start at a multiple of 16 bytes");
  cpu::read_registers(words, 4);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t to = shuffle(address, 8 * matrix + of_lane / 4) + of_lane % 4 * 4;
    std::memcpy(cpu::at_address(to, 4), words + matrix, 4);
    cpu::block->unseen[to / 16] = true;
    cpu::lane().written.push_back(to / 16);
  }
}
inline void show_writes() {
  if (cpu::without("show_writes")) return;
  for (const uint32_t piece : cpu::lane().written) cpu::block->unseen[piece] = false;
  cpu::lane().written.clear();
}

using EncodeTiled = decltype(&cpu::encode);
inline EncodeTiled encode_tiled() { return &cpu::encode; }

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int blocks, int threads, int shared, const Params& p, cudaStream_t) {
  return cpu::launch(blocks, threads, shared, [&] { kernel(p); });
}

}  // namespace fastvit::sm90::hopper
