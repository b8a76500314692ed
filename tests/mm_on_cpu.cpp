// aten::mm of 16-bit factors with a float32 result, which PyTorch has on a GPU alone: as loops, for cuda_on_cpu.py.
#include <torch/csrc/stable/library.h>

#include "cuda/glue.h"

namespace fastvit {
namespace {

Tensor wide(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

Tensor mm(Tensor a, Tensor b, ScalarType dtype) {
  const Checks checks("mm", "a", a);
  checks.same_dtype("the result", checks.dtype("the result", dtype), "float32", DType::kFloat32);
  const Tensor left = wide(a), right = wide(b), out = empty(a, {a.size(0), b.size(1)}, dtype);
  const int64_t depth = a.size(1), cols = b.size(1);
  const float *const l = static_cast<float*>(left.data_ptr()), *const r = static_cast<float*>(right.data_ptr());
  float* const sums = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < a.size(0); ++i) {
    for (int64_t j = 0; j < cols; ++j) sums[i * cols + j] = 0.f;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < cols; ++j) sums[i * cols + j] += l[i * depth + k] * r[k * cols + j];
    }
  }
  return out;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("mm.dtype", TORCH_BOX(&fastvit::mm)); }
