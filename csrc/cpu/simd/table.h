// The table of this instruction set.
#pragma once

#include "attention.h"
#include "epilogue.h"
#include "gemm.h"
#include "heads.h"
#include "patches.h"
#include "rows.h"
#include "transpose.h"

namespace fastvit::cpu::FASTVIT_ISA {

#define FASTVIT_STRING_OF(name) #name
#define FASTVIT_STRING(name) FASTVIT_STRING_OF(name)

const Kernels* table() {
  static const Kernels kernels{
      .isa = FASTVIT_STRING(FASTVIT_ISA),
      .packs_narrow = GEMM_COLUMNS < PANEL,
      .gemm_fp32 = gemm_fp32,
#if FASTVIT_HAS_DOT_PAIRS
      .gemm_bf16 = __builtin_cpu_supports("avx512bf16") ? gemm_bf16 : nullptr,
#else
      .gemm_bf16 = nullptr,
#endif
      .pack_panel_transposed = pack_panel_transposed,
      .pack_panel_transposed_bf16 = pack_panel_transposed_bf16,
      .pack_panel = pack_panel,
      .pack_panel_bf16 = pack_panel_bf16,
      .transpose_panel = transpose_panel,
      .transpose_rows16 = transpose_rows16,
      .store_transposed = store_transposed,
      .dot_row = dot_row,
      .scale_row = scale_row,
      .row_statistics = row_statistics,
      .normalize_row = normalize_row,
      .normalize_row_backward = normalize_row_backward,
      .add_to = add_to,
      .prepare_heads = prepare_heads,
      .prepare_heads_backward = prepare_heads_backward,
      .store_biased = store_biased,
      .store_activated = store_activated,
      .store_residual = store_residual,
      .activation_backward = activation_backward,
      .activation_backward_bf16 = activation_backward_bf16,
      .softmax_rows = softmax_rows,
      .store_scaled = store_scaled,
      .row_dots = row_dots,
      .score_gradients = score_gradients,
      .score_gradients_bf16 = score_gradients_bf16,
      .gather_patch = gather_patch,
  };
  return &kernels;
}

}  // namespace fastvit::cpu::FASTVIT_ISA
