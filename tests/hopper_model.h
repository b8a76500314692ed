// A model of Hopper's instructions: what they do to registers and memory, by the PTX manual. hopper_on_cpu.h offers it
// to kernels.
//
// Every CUDA thread is a fiber (cuda_on_cpu.h). What is asynchronous on a GPU is so here, and as unkind as the manual
// allows: a load spoils its target at once and brings the values later, in any order; a product's registers hold NaN
// until the wait, and it reads its operands at any time before. FASTVIT_CUDA_ON_CPU_ORDER chooses: 0 everything as late
// as it may be, 1 as early, any other number a seed. FASTVIT_CUDA_ON_CPU_WITHOUT names an instruction that then does
// nothing, to show that a kernel without it is found out. What a GPU would answer with a fault or a hang is an error
// here.
#pragma once

#include <cuda.h>

#include <cstring>
#include <map>
#include <random>
#include <string>

#include "cuda/common.cuh"
#include "hopper_layouts.h"

#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace hopper_on_cpu {

constexpr int kLanes = 32;
constexpr uint32_t kFirstAddress = 0x400;  // dynamic shared memory starts where its alignment says
constexpr int kShared = 227 * 1024;

struct MapFacts {  // in the 128 bytes that are the driver's own
  char* data;
  uint64_t sizes[4], strides[4];
  uint32_t box[4];
};
static_assert(sizeof(MapFacts) <= sizeof(CUtensorMap));

struct Load {
  MapFacts map;
  const void* barrier;
  char* to;
  int at[4];
  int due;  // the sweep from which on it may arrive
};

// Where a product's operands are: in shared memory with k running fastest; in shared memory with m and n fastest; or a
// in registers, and b in shared memory with n fastest.
enum class Operands { kAlong, kAcross, kRegisters };

// A warp's 16 rows of a product of the warpgroup.
struct Product {
  int n = 0, issued = 0, group[kLanes];
  uint64_t a = 0, b = 0;
  Operands operands = Operands::kAlong;
  bool is_bf16 = false, add = false, done = false;
  float* d[kLanes];
  const uint32_t* registers[kLanes];
};

struct Hidden {  // an accumulator while products on it run
  std::vector<float> values;
  int products = 0;
};

struct Lane {
  std::function<bool()> ready;
  int shuffles = 0, products = 0, groups = 0, finished = 0, waits = 0;
  bool open = false, fenced = false;
  int registers = 0;
  std::map<float*, Hidden> hidden;
  std::vector<uint32_t> written;  // pieces of shared memory that products are not shown yet
};

struct Warp {
  std::vector<Product> products;
  int done = 0, waits = 0, rests_until = 0;
  bool over = false, held = false;  // held: its products are under way for as long as anything else can happen
  float exchanged[2][kLanes];
  Lane lanes[kLanes];
};

struct BarrierFacts {
  int count, missing;
  int64_t bytes = 0;
  uint32_t phase = 0;
};
struct NamedFacts {
  int arrived = 0, generation = 0;
};

struct Block {
  std::vector<Warp> warps;
  std::vector<Load> loads;
  std::map<const void*, BarrierFacts> barriers;
  std::map<int, NamedFacts> named;
  std::mt19937 random;
  unsigned order = 0;
  std::string without;
  uint32_t bytes = 0;                                                            // of shared memory
  std::vector<bool> unseen = std::vector<bool>((kFirstAddress + kShared) / 16);  // its pieces of 16 bytes
  int sweep = 0;
  int registers = 0;  // given back, less those taken
};

inline std::unique_ptr<Block> block;
inline std::string failure;
alignas(1024) inline char shared[2048 + kShared];

inline int thread() { return int(cuda_on_cpu::flat_thread()); }
inline Warp& warp() { return block->warps[thread() / kLanes]; }
inline Lane& lane() { return warp().lanes[thread() % kLanes]; }

// The fiber that fails is never resumed: the scheduler gives the block up.
inline void fail(const std::string& what) {
  if (failure.empty()) failure = what + " (thread " + std::to_string(thread()) + ")";
  for (;;) cuda_on_cpu::leave();
}
inline void expect(bool ok, const char* what) {
  if (!ok) fail(what);
}

inline bool without(const char* instruction) { return block->without == instruction; }

inline void leave_until(std::function<bool()> ready) {
  lane().ready = std::move(ready);
  cuda_on_cpu::leave();
}
inline void wait_until(std::function<bool()> ready) {
  if (!ready()) leave_until(std::move(ready));
}

inline bool chance(unsigned of) { return block->random() % of == 0; }

// With a seed, a warp may take its time: one time in `of`.
inline void rest(Warp& w, unsigned of) {
  if (block->order > 1 && chance(of)) w.rests_until = block->sweep + int(block->random() % 64);
}

// setmaxnreg: a GPU's thread that wants more would wait until others have given as many back.
inline void change_registers(int count) {
  expect(count % 8 == 0 && count >= 24 && count <= 256, "a number of registers that there is not");
  block->registers -= count - lane().registers;
  lane().registers = count;
}

inline char* at_address(uint32_t address, int bytes) {
  if (address < kFirstAddress || address + bytes > kFirstAddress + block->bytes) {
    failure = "shared memory outside of the block's";
    return shared;
  }
  return shared + address;
}

// --- products --------------------------------------------------------------------------------------------------------
inline void check_descriptor(uint64_t descriptor) {
  expect(descriptor >> 62 == 1, "a descriptor without the 128-byte swizzle");
  expect((descriptor >> 49 & 7) == 0, "a descriptor with a base offset");
  expect((descriptor & ~(uint64_t(3) << 62 | uint64_t(0x3fff) << 32 | uint64_t(0x3fff) << 16 | 0x3fff)) == 0,
         "a descriptor with reserved bits");
}

inline float value_of(uint16_t bits, bool is_bf16) {
  if (is_bf16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16&>(bits));
  return __half2float(reinterpret_cast<const __half&>(bits));
}

inline float operand(uint64_t descriptor, bool k_is_fastest, int mn, int k, bool is_bf16) {
  uint16_t bits;
  const uint32_t address = operand_address(descriptor, k_is_fastest, mn, k);
  std::memcpy(&bits, at_address(address, 2), 2);
  if (failure.empty() && block->unseen[address / 16]) failure = "a product reads what a thread has not shown it";
  return value_of(bits, is_bf16);
}

inline void multiply(Warp& w, int first_row, Product& p) {
  float a[16][16], b[16];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const Place at = fragment_place(row, k);
      a[row][k] = p.operands == Operands::kRegisters
                      ? value_of(uint16_t(p.registers[at.lane][at.value / 2] >> 16 * (at.value % 2)), p.is_bf16)
                      : operand(p.a, p.operands == Operands::kAlong, first_row + row, k, p.is_bf16);
    }
  }
  for (int n = 0; n < p.n; ++n) {
    for (int k = 0; k < 16; ++k) b[k] = operand(p.b, p.operands == Operands::kAlong, n, k, p.is_bf16);
    for (int row = 0; row < 16; ++row) {
      const Place at = accumulator_place(row, n);
      float& d = w.lanes[at.lane].hidden.at(p.d[at.lane]).values[at.value];
      double sum = p.add ? d : 0.;
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[k];
      d = float(sum);
    }
  }
  p.done = true;
}

// In the order of issue, up to `end`.
inline void run_products(int number, int end) {
  Warp& w = block->warps[number];
  for (; w.done < end; ++w.done) multiply(w, number % 4 * 16, w.products[w.done]);
}
inline int issued(const Warp& w) {
  int count = w.done;
  while (count < int(w.products.size()) && w.products[count].issued == kLanes) ++count;
  return count;
}

inline void issue(Operands operands, float* d, int n, uint64_t a, const uint32_t* registers, uint64_t b, bool add,
                  bool is_bf16) {
  Warp& w = warp();
  Lane& l = lane();
  const int of_lane = thread() % kLanes;
  expect(l.fenced, "a product without a fence since registers were last touched");
  if (operands != Operands::kRegisters) check_descriptor(a);
  check_descriptor(b);
  if (l.products == int(w.products.size())) w.products.emplace_back();
  Product& p = w.products[l.products++];
  if (p.issued == 0) p.n = n, p.a = a, p.b = b, p.add = add, p.operands = operands, p.is_bf16 = is_bf16;
  expect(p.n == n && p.a == a && p.b == b && p.add == add && p.operands == operands,
         "the threads of a warp issue different products");
  p.d[of_lane] = d, p.registers[of_lane] = registers, p.group[of_lane] = l.groups;
  ++p.issued;
  Hidden& hidden = l.hidden[d];
  if (hidden.products++ == 0) {
    hidden.values.assign(d, d + n / 2);
    std::fill(d, d + n / 2, NAN);
  }
  l.open = true;
  if (block->order == 1 && p.issued == kLanes) run_products(thread() / kLanes, issued(w));
}

// Other instructions that read registers, by the manual on wgmma.wait_group ("accessing ... the input register
// containing the fragments of matrix A") and wgmma.fence.
inline void read_registers(const uint32_t* from, int count) {
  Lane& l = lane();
  for (int i = l.finished; i < l.products; ++i) {
    const uint32_t* fragment = warp().products[i].registers[thread() % kLanes];
    expect(fragment == nullptr || fragment + 4 <= from || from + count <= fragment,
           "a product's operand is read from registers before the product was waited for");
  }
  l.fenced = false;
}

inline void wait_for_groups(int latest) {
  Lane& l = lane();
  Warp& w = warp();
  expect(!l.open, "a wait with products that were not committed");
  int end = l.finished;
  while (end < l.products && w.products[end].group[thread() % kLanes] < l.groups - latest) ++end;
  if (++l.waits > w.waits) {
    ++w.waits;
    rest(w, 3);
    w.held = block->order == 0 && end > w.done;
  }
  wait_until([&w, end] { return !w.held && block->sweep >= w.rests_until && issued(w) >= end; });
  run_products(thread() / kLanes, end);
  for (; l.finished < end; ++l.finished) {
    float* d = w.products[l.finished].d[thread() % kLanes];
    Hidden& hidden = l.hidden.at(d);
    if (--hidden.products > 0) continue;
    std::copy(hidden.values.begin(), hidden.values.end(), d);
    l.hidden.erase(d);
  }
  l.fenced = false;
}

// --- barriers and loads ----------------------------------------------------------------------------------------------
inline BarrierFacts& facts_of(const void* barrier) {
  const auto found = block->barriers.find(barrier);
  if (found == block->barriers.end()) fail("a barrier that was not made ready");
  return found->second;
}
inline void end_phase(BarrierFacts& facts) {
  if (facts.missing > 0 || facts.bytes != 0) return;
  facts.phase ^= 1;
  facts.missing = facts.count;
}
inline void arrive(const void* barrier, int64_t bytes) {
  BarrierFacts& facts = facts_of(barrier);
  expect(facts.missing > 0, "more arrivals than a barrier counts");
  facts.bytes += bytes;
  --facts.missing;
  end_phase(facts);
}

inline uint32_t address_of(const void* p) { return uint32_t(static_cast<const char*>(p) - shared); }

inline int64_t box_bytes(const MapFacts& map) { return int64_t(2) * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

inline void deliver(size_t number) {
  const Load load = block->loads[number];
  block->loads.erase(block->loads.begin() + number);
  const MapFacts& map = load.map;
  for (uint32_t row = 0; row < map.box[1]; ++row) {  // the other two have a box of one
    for (uint32_t column = 0; column < map.box[0]; ++column) {
      const int64_t at[4] = {int64_t(load.at[0]) + column, int64_t(load.at[1]) + row, load.at[2], load.at[3]};
      uint16_t value = 0;
      bool inside = true;
      int64_t offset = 0;
      for (int i = 0; i < 4; ++i) {
        inside = inside && at[i] >= 0 && uint64_t(at[i]) < map.sizes[i];
        offset += at[i] * int64_t(map.strides[i]);
      }
      if (inside) std::memcpy(&value, map.data + offset, 2);
      const uint32_t to = swizzle128(address_of(load.to) + row * map.box[0] * 2 + column * 2);
      std::memcpy(at_address(to, 2), &value, 2);
    }
  }
  BarrierFacts& facts = block->barriers.at(load.barrier);
  facts.bytes -= box_bytes(map);
  end_phase(facts);
}

// As strict as the driver where the manual is.
inline CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
  const bool known = (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                     rank == 4 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  bool ok = known && reinterpret_cast<uintptr_t>(out) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  ok = ok && box[0] * 2 == 128 && box[2] == 1 && box[3] == 1;  // all that `deliver` knows; the driver takes less too
  for (cuuint32_t i = 0; ok && i < rank; ++i) {
    ok = sizes[i] > 0 && sizes[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    ok = ok && (i == 0 || (strides[i - 1] > 0 && strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t(1) << 40));
  }
  if (!ok) return CUDA_ERROR_INVALID_VALUE;
  MapFacts facts{static_cast<char*>(data), {}, {2}, {}};
  for (int i = 0; i < 4; ++i) {
    facts.sizes[i] = sizes[i], facts.box[i] = box[i];
    if (i > 0) facts.strides[i] = strides[i - 1];
  }
  std::memcpy(out, &facts, sizeof(facts));
  return CUDA_SUCCESS;
}

// --- scheduling ------------------------------------------------------------------------------------------------------
// Seeds differ in whether loads and products are slow.
inline bool are_loads_slow() { return block->order % 2; }
inline bool are_products_slow() { return block->order / 2 % 2; }

inline int due() {
  constexpr int kNever = 1 << 30;
  if (block->order == 0) return kNever;
  if (block->order == 1) return 0;
  if (!are_loads_slow()) return block->sweep + int(block->random() % 4);
  return chance(3) ? kNever : block->sweep + int(block->random() % 64);
}

// One of the warps whose products were held goes on.
inline bool let_go() {
  std::vector<Warp*> held;
  for (Warp& w : block->warps) {
    if (w.held) held.push_back(&w);
  }
  if (held.empty() || (!block->loads.empty() && chance(2))) return false;
  held[block->random() % held.size()]->held = false;
  return true;
}

// Something asynchronous happens; `must`: nothing else can.
inline bool happen(bool must) {
  if (must && let_go()) return true;
  if (block->order > 1 && !are_products_slow() && chance(3)) {
    const int number = int(block->random() % block->warps.size());
    run_products(number, std::min(block->warps[number].done + 1, issued(block->warps[number])));
  }
  if (block->loads.empty()) return false;
  const size_t number = block->random() % block->loads.size();
  if (!must && block->loads[number].due > block->sweep) return false;
  deliver(number);
  return true;
}

// Whether one of its threads went on.
inline bool run_warp(int number) {
  Warp& w = block->warps[number];
  bool moved = false;
  w.over = true;
  for (int i = 0; i < kLanes && failure.empty(); ++i) {
    cuda_on_cpu::Fiber& fiber = *cuda_on_cpu::fibers[number * kLanes + i];
    Lane& l = w.lanes[i];
    if (fiber.done) continue;
    w.over = false;
    if (l.ready && !l.ready()) continue;
    l.ready = nullptr;
    cuda_on_cpu::resume(fiber);
    moved = true;
  }
  return moved;
}

inline unsigned order_of_test() {
  const char* order = std::getenv("FASTVIT_CUDA_ON_CPU_ORDER");
  return order == nullptr ? 0 : unsigned(std::atoi(order));
}

inline void run_block(int warps, int bytes) {
  block = std::make_unique<Block>();
  const unsigned order = order_of_test();
  const char* without = std::getenv("FASTVIT_CUDA_ON_CPU_WITHOUT");
  if (without != nullptr) block->without = without;
  block->warps.resize(warps);
  block->order = order;
  block->bytes = bytes;
  for (Warp& w : block->warps) {  // as many at the launch as one block may have
    for (Lane& l : w.lanes) l.registers = 65536 / (warps * kLanes) / 8 * 8;
  }
  block->random.seed(order);
  std::memset(shared, 0xff, sizeof(shared));  // NaN in every dtype
  for (int i = 0; i < warps * kLanes; ++i) {
    cuda_on_cpu::fibers[i]->thread = {unsigned(i), 0, 0};
    cuda_on_cpu::fibers[i]->done = false;
  }
  std::vector<int> turns(warps);
  for (int i = 0; i < warps; ++i) turns[i] = i;
  for (bool alive = true; alive && failure.empty(); ++block->sweep) {
    bool moved = false, rests = false;
    alive = false;
    if (order > 1) std::shuffle(turns.begin(), turns.end(), block->random);
    for (int number : turns) {
      Warp& w = block->warps[number];
      if (w.over) continue;
      if (block->sweep >= w.rests_until) rest(w, 64);
      if (block->sweep < w.rests_until) {
        rests = true;
      } else {
        moved = run_warp(number) || moved;
      }
      alive = alive || !w.over;
    }
    const bool stuck = alive && !moved && !rests;
    if (!happen(stuck) && stuck && failure.empty()) failure = "threads wait for each other for ever";
  }
  if (!failure.empty()) return;
  if (!block->loads.empty()) failure = "a load was still under way at the end";
  if (block->registers < 0) failure = "threads wait for registers for ever";
  for (const auto& [name, facts] : block->named) {
    if (facts.arrived != 0) failure = "a barrier by name was left half full";
  }
  for (const Warp& w : block->warps) {
    if (w.done != int(w.products.size())) failure = "a product was never waited for";
  }
}

inline cudaError_t launch(int blocks, int threads, int bytes, const std::function<void()>& kernel) {
  failure.clear();
  if (blocks < 1 || threads > 1024 || threads % 128 != 0 || bytes > kShared) return cudaErrorInvalidValue;
  cuda_on_cpu::grid_size = dim3(blocks), cuda_on_cpu::block_size = dim3(threads), cuda_on_cpu::kernel = &kernel;
  while (int(cuda_on_cpu::fibers.size()) < threads) {
    cuda_on_cpu::fibers.push_back(std::make_unique<cuda_on_cpu::Fiber>());
  }
  for (int i = 0; i < blocks && failure.empty(); ++i) {
    cuda_on_cpu::block_index = {unsigned(i), 0, 0};
    run_block(threads / kLanes, bytes);
  }
  if (failure.empty()) return cudaGetLastError();
  std::fprintf(stderr, "hopper_model: %s\n", failure.c_str());
  cuda_on_cpu::fibers.clear();  // they are somewhere inside of the kernel
  return cudaErrorAssert;
}

}  // namespace hopper_on_cpu
