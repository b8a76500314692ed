#include "gemm.h"

#include <ATen/native/CPUBlas.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fastvit::cpu {
namespace {

// Matrix tiles (AMX) outrun any vector unit; PyTorch's kernels know how to use them.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
  return false;
#endif
}

// oneDNN may be built without these kernels, or refuse this machine: ask it for one small product.
bool probe_bf16_gemm() {
  c10::BFloat16 a[4], b[2 * PANEL * 2];
  float c[2 * PANEL];
  for (auto& value : a) value = 1.0f;
  for (auto& value : b) value = 2.0f;
  try {
    at::native::cpublas::brgemm(2, PANEL, 2, 2, PANEL, PANEL, false, a, b, c, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  for (float value : c) {
    if (value != 4.0f) return false;
  }
  return true;
}

template <class T, class Pack>
PackedWeight pack_panels(const at::Tensor& source, int64_t n, int64_t k, const Pack& pack) {
  PackedWeight packed{n, k, ceil_div(n, PANEL), {}};
  packed.data = at::empty({packed.panels, padded_k<T>(k), PANEL}, source.options());
  T* dst = packed.data.data_ptr<T>();
  parallel_tasks(packed.panels, [&](int64_t i) {
    pack(source.const_data_ptr<T>(), i * PANEL, std::min(PANEL, n - i * PANEL), dst + i * padded_k<T>(k) * PANEL);
  });
  return packed;
}

template <class T>
PackedWeight pack_weight_as(const at::Tensor& weight) {
  const int64_t stride = weight.stride(0), k = weight.size(1);
  return pack_panels<T>(weight, weight.size(0), k, [&](const T* src, int64_t n0, int64_t n, T* dst) {
    pack_panel_transposed(src + n0 * stride, stride, n, k, dst);
  });
}

template <class T>
PackedWeight pack_matrix_as(const at::Tensor& matrix, const float* scale) {
  const int64_t stride = matrix.stride(0), k = matrix.size(0);
  return pack_panels<T>(matrix, matrix.size(1), k, [&](const T* src, int64_t n0, int64_t n, T* dst) {
    pack_panel(src + n0, stride, n, k, scale, dst);
  });
}

}  // namespace

bool use_brgemm() {
  static const bool available = kernels().gemm_bf16 && has_amx() && probe_bf16_gemm();
  return available && at::globalContext().userEnabledMkldnn();
}

const char* bf16_gemm_kind() { return use_brgemm() ? "brgemm" : kernels().gemm_bf16 ? "avx512bf16" : "fp32"; }

bool has_bf16_gemm() { return use_brgemm() || kernels().gemm_bf16; }

at::ScalarType compute_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && has_bf16_gemm() ? at::kBFloat16 : at::kFloat;
}

void gemm_tile(const GemmTile<float>& tile) { kernels().gemm_fp32(tile); }

void gemm_tile(const GemmTile<c10::BFloat16>& t) {
  if (use_brgemm()) {
    at::native::cpublas::brgemm(t.rows, t.columns, t.k, t.lda, PANEL, t.ldc, t.accumulate, t.a, t.b, t.c, true);
  } else {
    kernels().gemm_bf16(t);
  }
}

void release_bf16_gemm() {
  if (use_brgemm()) at::native::cpublas::brgemm_release(true);
}

at::Tensor packable(const at::Tensor& weight, at::ScalarType dtype) {
  const at::Tensor converted = weight.to(dtype);
  return converted.stride(1) == 1 ? converted : converted.contiguous();
}

PackedWeight pack_weight(const at::Tensor& weight) {
  const at::Tensor source = packable(weight, compute_dtype(weight.scalar_type()));
  return source.scalar_type() == at::kFloat ? pack_weight_as<float>(source) : pack_weight_as<c10::BFloat16>(source);
}

PackedWeight pack_matrix(const at::Tensor& matrix, at::ScalarType dtype, const float* scale) {
  const at::Tensor source = packable(matrix, dtype);
  return dtype == at::kFloat ? pack_matrix_as<float>(source, scale) : pack_matrix_as<c10::BFloat16>(source, scale);
}

}  // namespace fastvit::cpu
