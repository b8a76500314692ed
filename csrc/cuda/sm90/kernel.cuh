// A persistent, warp-specialised product on TMA and wgmma, put together from CUTLASS's parts: tiles, main loop, launch.
#pragma once

#include <cutlass/device_kernel.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/common.cuh"
#include "cuda/sm90/gemm.h"
#include "cuda/sm90/nodes.cuh"

namespace fastvit::sm90 {

using cute::_0;
using cute::_1;
using cute::Int;
using cute::Shape;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

template <DType DTYPE>
using ElementOf =
    std::conditional_t<DTYPE == DType::kFloat32, float,
                       std::conditional_t<DTYPE == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>>;

template <TileSize SIZE>
using TileShape = Shape<Int<SIZE.rows>, Int<SIZE.cols>, Int<64>>;
template <TileSize SIZE>
using ClusterShape = Shape<Int<SIZE.cluster_rows>, Int<SIZE.cluster_cols>, _1>;

// Two warpgroups with a tile each: one multiplies while the other is in its epilogue.
struct PingPong {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
// Two warpgroups share a tile: the most reuse of operands, the epilogue is not hidden.
struct Cooperative {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

// What nodes ask of the epilogue they are in. `Source` is the residual's type, or void.
template <typename Element, TileSize SIZE, typename Source, typename Schedules = PingPong>
struct EpilogueParts {
  using Shape = TileShape<SIZE>;
  using Schedule = typename Schedules::Epilogue;
  using Descriptor =
      cutlass::epilogue::collective::detail::EpilogueDescriptor<Shape, cutlass::epilogue::collective::EpilogueTileAuto,
                                                                Source, Element, Schedule>;
  using StoreDescriptor = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, Element>;
  using LoadDescriptor = cutlass::epilogue::collective::detail::AuxLoadDescriptor<Descriptor, RowMajor, Element>;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits_v<Element>;

  using Store = fusion::Sm90AuxStore<StoreDescriptor::Stages, typename Descriptor::EpilogueTile, Element, kRound,
                                     typename StoreDescriptor::Stride, typename StoreDescriptor::SmemLayoutAtom,
                                     typename StoreDescriptor::CopyOpR2S>;
  using Load = fusion::Sm90AuxLoad<LoadDescriptor::Stages, typename Descriptor::EpilogueTile, Element,
                                   typename LoadDescriptor::Stride, typename LoadDescriptor::SmemLayoutAtom,
                                   typename LoadDescriptor::CopyOpS2R>;
  using Row = RowVector<Shape, Element>;
  using Column = fusion::Sm90ColBroadcast<0, Shape, float>;
  template <template <class> class Fn, typename Out = float>
  using Compute = fusion::Sm90Compute<Fn, Out, float, kRound>;
};

// `Source` is the residual's type, which the result takes over, or void.
template <typename Element, TileSize SIZE, typename WeightLayout, typename Tree, typename Source = void,
          typename Schedules = PingPong>
struct Product {
  using Shape = TileShape<SIZE>;
  using Out = std::conditional_t<cute::is_void_v<Source>, Element, Source>;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits_v<Element>;
  static constexpr int kOutAlignment = 128 / cutlass::sizeof_bits_v<Out>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape, ClusterShape<SIZE>,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, RowMajor, kOutAlignment, Out, RowMajor,
      kOutAlignment, typename Schedules::Epilogue, Tree>::CollectiveOp;
  using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, WeightLayout,
      kAlignment, float, Shape, ClusterShape<SIZE>,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedules::Main>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, MainLoop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  static_assert(sizeof(typename Kernel::SharedStorage) <= 227 * 1024, "more shared memory than a block has");
};

template <typename Element>
Element* data(const Matrix& m) {
  return static_cast<Element*>(m.data);
}

// A row-major matrix's stride as CUTLASS writes it.
inline cute::Stride<int64_t, _1, int64_t> row_stride(const Matrix& m) { return {m.stride, _1{}, 0}; }

// Not CUTLASS's own adapter, which keeps the reason of a refused launch to itself.
template <typename Kernel>
cudaError_t launch(typename Kernel::Params const& params, cudaStream_t stream) {
  using Cluster = typename Kernel::ClusterShape;
  auto* kernel = &cutlass::device_kernel<Kernel>;
  constexpr int kShared = Kernel::SharedStorageSize;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error == cudaSuccess) {
    // CUTLASS's kernels wait before their first load, and all that they store follows from what they load
    cudaLaunchAttribute attributes[2] = {overlapping_launch(), {}};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = kShared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cute::size(Cluster{}) > 1 ? 2 : 1;
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  const cudaError_t pending = cudaGetLastError();
  return error != cudaSuccess ? error : pending;
}

// `Kernel` is a Product's kernel under a name of its own, `Params` one of gemm.h's.
template <typename Kernel, typename Element, typename Params, typename EpilogueArguments>
cudaError_t launch(const Params& p, const Matrix& x, EpilogueArguments const& epilogue, cudaStream_t stream) {
  typename Kernel::StrideB stride{};  // of the weight as (N, K)
  if constexpr (cute::is_same_v<cute::remove_cvref_t<decltype(cute::get<0>(stride))>, int64_t>) {
    cute::get<0>(stride) = p.weight.stride;
  } else {
    cute::get<1>(stride) = p.weight.stride;
  }
  typename Kernel::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {int(p.rows), int(p.cols), int(p.depth)},
                                       {data<Element>(x), row_stride(x), data<Element>(p.weight), stride},
                                       epilogue,
                                       {p.device, multiprocessors(p.device)}};
  if (!Kernel::can_implement(arguments)) return cudaErrorInvalidValue;
  return launch<Kernel>(Kernel::to_underlying_arguments(arguments, nullptr), stream);
}

}  // namespace fastvit::sm90
