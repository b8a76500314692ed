// y = residual + row_scale * layer_scale * (x W^T + bias): fc2 or the attention projection, with LayerScale and
// DropPath.
#pragma once

#include "cuda/sm90/kernel.cuh"

namespace fastvit::sm90 {

template <DType DTYPE, Tile TILE>
struct LinearResidualTraits {
  using Element = ElementOf<DTYPE>;
  using Parts = EpilogueParts<Element, TILE, Element>;
  using Tree =
      fusion::Sm90EVT<typename Parts::template Compute<ScaleResidual, Element>, fusion::Sm90AccFetch,
                      typename Parts::Row, typename Parts::Row, typename Parts::Column, fusion::Sm90SrcFetch<Element>>;
  using Product = sm90::Product<Element, TILE, ColumnMajor, Tree, Element>;
};

// The name that profilers and benchmarks/aot_cuda.py show, with the bytes of shared memory a block takes.
template <DType DTYPE, Tile TILE,
          int SHARED = int(sizeof(typename LinearResidualTraits<DTYPE, TILE>::Product::Kernel::SharedStorage))>
struct LinearResidualKernel : LinearResidualTraits<DTYPE, TILE>::Product::Kernel {};

template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_residual(const LinearResidual& p, cudaStream_t stream) {
  using Element = ElementOf<DTYPE>;
  using Product = typename LinearResidualTraits<DTYPE, TILE>::Product;
  typename Product::Epilogue::Arguments epilogue{{{}, {p.bias, 0.f}, {p.layer_scale, 1.f}, {p.row_scale, 1.f}, {}, {}},
                                                 data<Element>(p.residual),
                                                 row_stride(p.residual),
                                                 data<Element>(p.y),
                                                 row_stride(p.y)};
  return launch<LinearResidualKernel<DTYPE, TILE>, Element>(p, p.x, epilogue, stream);
}

}  // namespace fastvit::sm90
