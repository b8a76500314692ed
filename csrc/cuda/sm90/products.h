// What the glue of Hopper's products shares: what TMA asks of a matrix, and the launch of the right kernel.
#pragma once

#include <tuple>

#include "cuda/glue.h"
#include "cuda/sm90/gemm.h"

namespace fastvit::sm90 {

inline Tile tile_of(const Checks& checks, const std::string& name) {
  if (name == "large") return Tile::kLarge;
  if (name == "small") return Tile::kSmall;
  checks.fail("tile is '" + name + "', expected 'large' or 'small'");
}

// A matrix that TMA can read or write.
inline Matrix tma(const Checks& checks, const char* name, const Matrix& m, int64_t cols) {
  checks.expect(cols % 8 == 0, [&] {
    return std::string(name) + " has " + std::to_string(cols) + " columns, expected a multiple of 8";
  });
  checks.expect(m.stride >= cols, [&] {
    return std::string(name) + " has rows that overlap, expected a stride of " + std::to_string(cols) + " or more";
  });
  checks.expect(aligned(m), [&] {
    return std::string(name) + " is misaligned, expected rows that start at multiples of 16 bytes";
  });
  return m;
}

// The same, of 16-bit operands in one dtype.
inline Matrix tma(const Checks& checks, const char* name, const Matrix& m, int64_t cols, DType dtype) {
  checks.expect(m.dtype != DType::kFloat32, [&] { return std::string(name) + " is float32, expected 16 bits"; });
  checks.same_dtype(name, m.dtype, "x", dtype);
  checks.expect(cols > 0, [&] { return std::string(name) + " has no columns, expected at least 8"; });
  return tma(checks, name, m, cols);
}

// Calls f<DTYPE, TILE>() for the pair at hand.
template <typename F>
cudaError_t with_tile(DType dtype, Tile tile, F&& f) {
  if (dtype == DType::kBFloat16) {
    return tile == Tile::kLarge ? f.template operator()<DType::kBFloat16, Tile::kLarge>()
                                : f.template operator()<DType::kBFloat16, Tile::kSmall>();
  }
  return tile == Tile::kLarge ? f.template operator()<DType::kFloat16, Tile::kLarge>()
                              : f.template operator()<DType::kFloat16, Tile::kSmall>();
}

inline void run(const char* op, const LinearAct& p, cudaStream_t stream) {
  check_launch(op, with_tile(p.x.dtype, p.tile,
                             [&]<DType DTYPE, Tile TILE>() { return launch_linear_act<DTYPE, TILE>(p, stream); }));
}

inline void run(const char* op, const LinearResidual& p, cudaStream_t stream) {
  const bool wide = p.residual.dtype == DType::kFloat32;
  check_launch(op, with_tile(p.x.dtype, p.tile, [&]<DType DTYPE, Tile TILE>() {
                 return wide ? launch_linear_residual<DTYPE, TILE, DType::kFloat32>(p, stream)
                             : launch_linear_residual<DTYPE, TILE, DTYPE>(p, stream);
               }));
}

inline void run(const char* op, const LinearActGrad& p, cudaStream_t stream) {
  check_launch(op, with_tile(p.dy.dtype, p.tile,
                             [&]<DType DTYPE, Tile TILE>() { return launch_linear_act_grad<DTYPE, TILE>(p, stream); }));
}

// An op of ops.cpp that others are made of: (dh, act(h) once more, column sums of dh)
std::tuple<Tensor, Tensor, Tensor> linear_act_grad(Tensor dy, Tensor weight, Tensor h, std::string act, bool want_a,
                                                   std::optional<ScalarType> sums, std::string tile);

}  // namespace fastvit::sm90
