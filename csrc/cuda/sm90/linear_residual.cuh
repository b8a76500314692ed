// y = residual + row_scale * layer_scale * (x W^T + bias): fc2 or the attention projection, with LayerScale and
// DropPath. STREAM is the dtype of residual and y: x's, or float32 as autocast keeps the residual stream.
#pragma once

#include "cuda/sm90/kernel.cuh"

namespace fastvit::sm90 {

template <DType DTYPE, Tile TILE, DType STREAM>
struct LinearResidualTraits {
  using Element = ElementOf<DTYPE>;
  using Out = ElementOf<STREAM>;
  static constexpr TileSize kSize = kLinearResidualTiles[int(TILE)];
  using Parts = EpilogueParts<Element, kSize, Out>;
  using Tree =
      fusion::Sm90EVT<typename Parts::template Compute<ScaleResidual, Out>, fusion::Sm90AccFetch, typename Parts::Row,
                      typename Parts::Row, typename Parts::Column, fusion::Sm90SrcFetch<Out>>;
  using Product = sm90::Product<Element, kSize, ColumnMajor, Tree, Out>;
};

// The name that profilers and benchmarks/aot_cuda.py show, with the bytes of shared memory a block takes.
template <DType DTYPE, Tile TILE, DType STREAM,
          int SHARED = int(sizeof(typename LinearResidualTraits<DTYPE, TILE, STREAM>::Product::Kernel::SharedStorage))>
struct LinearResidualKernel : LinearResidualTraits<DTYPE, TILE, STREAM>::Product::Kernel {};

template <DType DTYPE, Tile TILE, DType STREAM>
cudaError_t launch_linear_residual(const LinearResidual& p, cudaStream_t stream) {
  using Traits = LinearResidualTraits<DTYPE, TILE, STREAM>;
  using Out = typename Traits::Out;
  typename Traits::Product::Epilogue::Arguments epilogue{
      {{}, {p.bias, 0.f}, {p.layer_scale, 1.f}, {p.row_scale, 1.f}, {}, {}},
      data<Out>(p.residual),
      row_stride(p.residual),
      data<Out>(p.y),
      row_stride(p.y)};
  return launch<LinearResidualKernel<DTYPE, TILE, STREAM>, typename Traits::Element>(p, p.x, epilogue, stream);
}

}  // namespace fastvit::sm90
