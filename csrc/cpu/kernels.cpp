#include "kernels.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace fastvit::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
bool has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
#endif

const Kernels* choose() {
  const char* asked = std::getenv("FASTVIT_CPU_ISA");
  if (!asked || !*asked) {
    const Kernels* table = has_avx512() ? avx512::table() : has_avx2() ? avx2::table() : baseline::table();
    TORCH_CHECK(table, "this build of fastvit has no kernels for this machine: it was made on another one");
    return table;
  }
  const std::string_view name = asked;
  TORCH_CHECK_VALUE(name == "avx512" || name == "avx2" || name == "baseline", "FASTVIT_CPU_ISA is ", name,
                    ", expected avx512, avx2 or baseline");
  TORCH_CHECK_VALUE(name == "baseline" || (name == "avx2" ? has_avx2() : has_avx512()), "FASTVIT_CPU_ISA is ", name,
                    ", which this machine does not have");
  const Kernels* table = name == "avx512" ? avx512::table() : name == "avx2" ? avx2::table() : baseline::table();
  TORCH_CHECK_VALUE(table, "FASTVIT_CPU_ISA is ", name, ", which this build does not have");
  return table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

bool packs_narrow() { return kernels().packs_narrow; }

void pack_panel_transposed(const float* src, int64_t stride, int64_t n, int64_t k, float* dst) {
  kernels().pack_panel_transposed(src, stride, n, k, dst);
}
void pack_panel_transposed(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, c10::BFloat16* dst) {
  kernels().pack_panel_transposed_bf16(src, stride, n, k, dst);
}
void pack_panel(const float* src, int64_t stride, int64_t n, int64_t k, const float* scale, float* dst) {
  kernels().pack_panel(src, stride, n, k, scale, dst);
}
void pack_panel(const c10::BFloat16* src, int64_t stride, int64_t n, int64_t k, const float* scale,
                c10::BFloat16* dst) {
  kernels().pack_panel_bf16(src, stride, n, k, scale, dst);
}
void transpose_panel(const float* src, int64_t stride, int64_t n, int64_t k, float* dst) {
  kernels().transpose_panel(src, stride, n, k, dst);
}
void transpose_rows16(const float* src, int64_t width, void* dst, int64_t ld, at::ScalarType dtype) {
  kernels().transpose_rows16(src, width, dst, ld, dtype);
}
void store_transposed(const TransposedTile& tile) { kernels().store_transposed(tile); }
float dot_row(const void* a, at::ScalarType dtype, const float* b, int64_t n) {
  return kernels().dot_row(a, dtype, b, n);
}

void scale_row(const void* src, at::ScalarType src_dtype, int64_t n, float scale, void* dst, at::ScalarType dst_dtype) {
  kernels().scale_row(src, src_dtype, n, scale, dst, dst_dtype);
}
Statistics row_statistics(const float* x, int64_t n, float eps) { return kernels().row_statistics(x, n, eps); }
void normalize_row(const float* x, int64_t n, Statistics stats, const float* weight, const float* bias, void* out,
                   at::ScalarType out_dtype) {
  kernels().normalize_row(x, n, stats, weight, bias, out, out_dtype);
}
void normalize_row_backward(const NormGradRow& row) { kernels().normalize_row_backward(row); }
void add_to(double* total, const float* values, int64_t n) { kernels().add_to(total, values, n); }

void prepare_heads(const HeadRowsIn& in, void* out, int64_t ld, at::ScalarType dtype) {
  kernels().prepare_heads(in, out, ld, dtype);
}
void prepare_heads_backward(const HeadRowsIn& in, const HeadGradRows& grads) {
  kernels().prepare_heads_backward(in, grads);
}

void store_biased(const TileSource& tile, const TileTarget& target) { kernels().store_biased(tile, target); }
void store_activated(const TileSource& tile, Activation act, const TileTarget& activated,
                     const TileTarget& pre_activation) {
  kernels().store_activated(tile, act, activated, pre_activation);
}
void store_residual(const ResidualTile& args) { kernels().store_residual(args); }
void activation_backward(const ActivationGradTile<float>& tile, Activation act) {
  kernels().activation_backward(tile, act);
}
void activation_backward(const ActivationGradTile<c10::BFloat16>& tile, Activation act) {
  kernels().activation_backward_bf16(tile, act);
}

void softmax_rows(const SoftmaxRows& block) { kernels().softmax_rows(block); }
void store_scaled(const float* products, int64_t rows, int64_t columns, const float* factors,
                  const TileTarget& target) {
  kernels().store_scaled(products, rows, columns, factors, target);
}
void row_dots(const void* a, int64_t a_stride, const void* b, int64_t b_stride, at::ScalarType dtype, int64_t rows,
              int64_t n, float* out) {
  kernels().row_dots(a, a_stride, b, b_stride, dtype, rows, n, out);
}
void score_gradients(const ScoreGradTile& tile) { kernels().score_gradients(tile); }
void score_gradients_bf16(const ScoreGradTile& tile, c10::BFloat16* weights, c10::BFloat16* dscores,
                          c10::BFloat16* pairs) {
  kernels().score_gradients_bf16(tile, weights, dscores, pairs);
}

void gather_patch(const Patches& patches, int64_t i, float* out) { kernels().gather_patch(patches, i, out); }

}  // namespace fastvit::cpu
