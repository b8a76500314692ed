// y = act(h), h = x W^T + bias, stored on request: fc1 with its activation, or qkv.
#pragma once

#include "cuda/sm90/kernel.cuh"

namespace fastvit::sm90 {

template <DType DTYPE, Tile TILE>
struct LinearActTraits {
  using Element = ElementOf<DTYPE>;
  static constexpr TileSize kSize = kLinearActTiles[int(TILE)];
  using Parts = EpilogueParts<Element, kSize, void>;
  using Linear =
      fusion::Sm90EVT<typename Parts::template Compute<cutlass::plus>, fusion::Sm90AccFetch, typename Parts::Row>;
  using Tree = fusion::Sm90EVT<typename Parts::template Compute<Activate, Element>,
                               fusion::Sm90EVT<typename Parts::Store, Linear>>;
  using Product = sm90::Product<Element, kSize, ColumnMajor, Tree>;
};

// The name that profilers and benchmarks/aot_cuda.py show, with the bytes of shared memory a block takes.
template <DType DTYPE, Tile TILE,
          int SHARED = int(sizeof(typename LinearActTraits<DTYPE, TILE>::Product::Kernel::SharedStorage))>
struct LinearActKernel : LinearActTraits<DTYPE, TILE>::Product::Kernel {};

template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_act(const LinearAct& p, cudaStream_t stream) {
  using Element = ElementOf<DTYPE>;
  using Product = typename LinearActTraits<DTYPE, TILE>::Product;
  typename Product::Epilogue::Arguments epilogue{
      {{{{}, {p.bias, 0.f}, {}}, {data<Element>(p.h), row_stride(p.h)}}, {p.act}},
      nullptr,
      {},
      data<Element>(p.y),
      row_stride(p.y)};
  return launch<LinearActKernel<DTYPE, TILE>, Element>(p, p.x, epilogue, stream);
}

}  // namespace fastvit::sm90
