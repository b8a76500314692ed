// dh = (dy W) * act'(h) with its column sums, and a = act(h) for the weight gradient: fc2's and the activation's
// backward.
#pragma once

#include "cuda/sm90/kernel.cuh"

namespace fastvit::sm90 {

// Rows and columns past the end are zeros in every operand, so they need no test before they are added.
template <typename Schedules, typename Shape>
struct ColumnSumsOf {
  using Type = TileColumnSums<Shape>;
};
template <typename Shape>
struct ColumnSumsOf<Cooperative, Shape> {
  using Type = fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Shape, float, float,
                                        cutlass::FloatRoundStyle::round_to_nearest, cute::Stride<_0, _1, _0>, 4, true,
                                        false, false>;
};

template <DType DTYPE, Tile TILE>
struct LinearActGradTraits {
  using Element = ElementOf<DTYPE>;
  static constexpr TileSize kSize = kLinearActGradTiles[int(TILE)];
  using Schedules = std::conditional_t<TILE == Tile::kLarge, Cooperative, PingPong>;
  using Parts = EpilogueParts<Element, kSize, void, Schedules>;
  using Grads = fusion::Sm90EVT<ActivationGrad<typename Parts::Store>, fusion::Sm90AccFetch, typename Parts::Load>;
  using Tree = fusion::Sm90EVT<typename ColumnSumsOf<Schedules, TileShape<kSize>>::Type, Grads>;
  using Product = sm90::Product<Element, kSize, RowMajor, Tree, void, Schedules>;
};

// The name that profilers and benchmarks/aot_cuda.py show, with the bytes of shared memory a block takes.
template <DType DTYPE, Tile TILE,
          int SHARED = int(sizeof(typename LinearActGradTraits<DTYPE, TILE>::Product::Kernel::SharedStorage))>
struct LinearActGradKernel : LinearActGradTraits<DTYPE, TILE>::Product::Kernel {};

template <DType DTYPE, Tile TILE>
cudaError_t launch_linear_act_grad(const LinearActGrad& p, cudaStream_t stream) {
  using Element = ElementOf<DTYPE>;
  using Product = typename LinearActGradTraits<DTYPE, TILE>::Product;
  typename Product::Epilogue::Arguments epilogue{
      {{{}, {data<Element>(p.h), Element(0), row_stride(p.h)}, {{data<Element>(p.a), row_stride(p.a)}, p.act}},
       {p.partials}},
      nullptr,
      {},
      data<Element>(p.dh),
      row_stride(p.dh)};
  return launch<LinearActGradKernel<DTYPE, TILE>, Element>(p, p.dy, epilogue, stream);
}

}  // namespace fastvit::sm90
