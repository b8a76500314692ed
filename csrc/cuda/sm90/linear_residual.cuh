// y = residual + row_scale * layer_scale * (x W^T + bias): fc2 or the attention projection, with LayerScale and
// DropPath.
#pragma once

#include "cuda/sm90/kernel.cuh"

namespace fastvit::sm90 {

template <typename Element, Tile TILE>
struct LinearResidualTraits {
  using Parts = EpilogueParts<Element, TILE, Element>;
  using Tree =
      fusion::Sm90EVT<typename Parts::template Compute<ScaleResidual, Element>, fusion::Sm90AccFetch,
                      typename Parts::Row, typename Parts::Row, typename Parts::Column, fusion::Sm90SrcFetch<Element>>;
  using Product = sm90::Product<Element, TILE, ColumnMajor, Tree, Element>;
};

template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_residual(const LinearResidual& p, cudaStream_t stream) {
  using Element = ElementOf<DTYPE>;
  using Product = typename LinearResidualTraits<Element, TILE>::Product;
  typename Product::Epilogue::Arguments epilogue{{{}, {p.bias, 0.f}, {p.layer_scale, 1.f}, {p.row_scale, 1.f}, {}, {}},
                                                 data<Element>(p.residual),
                                                 row_stride(p.residual),
                                                 data<Element>(p.y),
                                                 row_stride(p.y)};
  return launch<Product, Element>(p, p.x, epilogue, stream);
}

}  // namespace fastvit::sm90
