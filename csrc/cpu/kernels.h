// The vector code of csrc/cpu/simd, compiled for several instruction sets: one table of functions each, and the choice
// of one when the first is called. So a single binary runs on every machine, and fast.
//
// Everything that vector code needs is included here: what is included after a target pragma would be compiled for it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../normal_tail.h"
#include "attention.h"
#include "dtypes.h"
#include "epilogue.h"
#include "gemm.h"
#include "grad.h"
#include "heads.h"
#include "patches.h"
#include "rows.h"

namespace fastvit::cpu {

struct Kernels {
  const char* isa;
  bool packs_narrow;
  void (*gemm_fp32)(const GemmTile<float>&);
  void (*gemm_bf16)(const GemmTile<c10::BFloat16>&);  // null where there are no instructions for it
  void (*pack_panel_transposed)(const float*, int64_t, int64_t, int64_t, float*);
  void (*pack_panel_transposed_bf16)(const c10::BFloat16*, int64_t, int64_t, int64_t, c10::BFloat16*);
  void (*pack_panel)(const float*, int64_t, int64_t, int64_t, const float*, float*);
  void (*pack_panel_bf16)(const c10::BFloat16*, int64_t, int64_t, int64_t, const float*, c10::BFloat16*);
  decltype(&cpu::transpose_panel) transpose_panel;
  decltype(&cpu::transpose_rows16) transpose_rows16;
  decltype(&cpu::store_transposed) store_transposed;
  decltype(&cpu::dot_row) dot_row;
  decltype(&cpu::scale_row) scale_row;
  decltype(&cpu::row_statistics) row_statistics;
  decltype(&cpu::normalize_row) normalize_row;
  decltype(&cpu::normalize_row_backward) normalize_row_backward;
  decltype(&cpu::add_to) add_to;
  decltype(&cpu::prepare_heads) prepare_heads;
  decltype(&cpu::prepare_heads_backward) prepare_heads_backward;
  decltype(&cpu::store_biased) store_biased;
  decltype(&cpu::store_activated) store_activated;
  decltype(&cpu::store_residual) store_residual;
  void (*activation_backward)(const ActivationGradTile<float>&, Activation);
  void (*activation_backward_bf16)(const ActivationGradTile<c10::BFloat16>&, Activation);
  decltype(&cpu::softmax_rows) softmax_rows;
  decltype(&cpu::store_scaled) store_scaled;
  decltype(&cpu::row_dots) row_dots;
  decltype(&cpu::score_gradients) score_gradients;
  decltype(&cpu::score_gradients_bf16) score_gradients_bf16;
  decltype(&cpu::gather_patch) gather_patch;
};

// The best set this machine has, or the one that FASTVIT_CPU_ISA names: avx512, avx2 or baseline. A sanitized build has
// one set alone; its setup.py names the others in FASTVIT_WITHOUT_... macros.
const Kernels& kernels();

// Each null where this build has none
namespace avx512 {
const Kernels* table();
}
namespace avx2 {
const Kernels* table();
}
namespace baseline {
const Kernels* table();
}

}  // namespace fastvit::cpu
