// What the glue checks of a tensor before its pointer goes to a kernel. Errors name op, tensor, rule and what came.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "layernorm_mlp.h"

namespace fastvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    default:
      return "dtype number " + std::to_string(int(dtype));
  }
}

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string out = "(";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + ")";
}

// An argument that an op does not take.
struct Misfit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The checks of one call, on the device of its first tensor.
class Checks {
 public:
  Checks(const char* op, const char* name, const Tensor& first) : op_(op), first_(name), device_(first.get_device()) {}

  [[noreturn]] void fail(const std::string& message) const { throw Misfit(std::string(op_) + ": " + message); }

  // `message` makes the text, for it takes longer than the check.
  template <typename Message>
  void expect(bool ok, Message&& message) const {
    if (!ok) fail(message());
  }

  DType dtype(const char* name, ScalarType dtype) const {
    switch (dtype) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      default:
        fail(std::string(name) + " is " + text(dtype) + ", expected float32, float16 or bfloat16");
    }
  }

  // A 2-D tensor, columns next to each other, rows at any stride.
  Matrix matrix(const char* name, const Tensor& t) const {
    expect(t.dim() == 2,
           [&] { return std::string(name) + " has shape " + text(t.sizes()) + ", expected (rows, columns)"; });
    expect(t.size(0) < (int64_t(1) << 31), [&] {
      return std::string(name) + " has " + std::to_string(t.size(0)) + " rows, expected fewer than 2147483648";
    });
    expect(t.stride(1) == 1 || t.size(1) <= 1, [&] {
      return std::string(name) + " has strides " + text(t.strides()) + ", expected 1 for the last dimension";
    });
    same_device(name, t);
    const int64_t stride = t.size(0) == 1 ? t.size(1) : t.stride(0);  // that of a single row may be anything
    return {t.data_ptr(), stride, dtype(name, t.scalar_type())};
  }

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols, const char* like) const {
    expect(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, [&] {
      return std::string(name) + " has shape " + text(t.sizes()) + ", expected (" + std::to_string(rows) + ", " +
             std::to_string(cols) + ") like " + like;
    });
    return matrix(name, t);
  }

  Matrix matrix(const char* name, const MaybeTensor& t, int64_t rows, int64_t cols, const char* like) const {
    return t ? matrix(name, *t, rows, cols, like) : Matrix{};
  }

  // A contiguous 1-D tensor of `size` elements in float32 or in `other`; absent is allowed.
  Vector vector(const char* name, const MaybeTensor& t, int64_t size, DType other, const char* like) const {
    if (!t) return {};
    expect(t->dim() == 1 && t->size(0) == size, [&] {
      return std::string(name) + " has shape " + text(t->sizes()) + ", expected (" + std::to_string(size) + ") like " +
             like;
    });
    expect(t->stride(0) == 1 || size <= 1,
           [&] { return std::string(name) + " is not contiguous, expected a stride of 1"; });
    same_device(name, *t);
    const DType kind = dtype(name, t->scalar_type());
    expect(kind == DType::kFloat32 || kind == other, [&] {
      return std::string(name) + " is " + text(t->scalar_type()) + ", expected float32 or the dtype of " + like;
    });
    return {t->data_ptr(), kind};
  }

  float* floats(const char* name, const MaybeTensor& t, int64_t size, const char* like) const {
    return static_cast<float*>(vector(name, t, size, DType::kFloat32, like).data);
  }

  // `wide` is `narrow`, or float32 beside 16 bits.
  void fits(const char* wide_name, DType wide, const char* narrow_name, DType narrow) const {
    expect(wide == narrow || wide == DType::kFloat32,
           [&] { return std::string(wide_name) + " has 16 bits, expected float32 or the dtype of " + narrow_name; });
  }

  void same_dtype(const char* name, DType dtype, const char* other_name, DType other) const {
    expect(dtype == other, [&] { return std::string(name) + " and " + other_name + " have two dtypes, expected one"; });
  }

 private:
  void same_device(const char* name, const Tensor& t) const {
    expect(t.get_device() == device_, [&] {
      return std::string(name) + " is on device " + std::to_string(t.get_device()) + ", expected " +
             std::to_string(device_) + " like " + first_;
    });
  }

  const char* op_;
  const char* first_;
  int device_;
};

// Makes a tensor's device current for as long as it lives, and knows the stream PyTorch uses there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace fastvit
