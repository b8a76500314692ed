// Nodes of the epilogues' visitor trees that CUTLASS does not have: vectors of either dtype, ViT's activations.
#pragma once

#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

#include "cuda/activation.h"
#include "cuda/sm90/column_sums.cuh"

namespace fastvit::sm90 {

namespace fusion = cutlass::epilogue::fusion;
using cutlass::Array;

// What the host has to do for a node whose arguments go to the kernel as they are: nothing.
template <typename NodeArguments>
struct PlainNode {
  using Arguments = NodeArguments;
  using Params = NodeArguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
};

struct RowVectorArguments {
  Vector vector;
  float otherwise = 0.f;  // where there is no vector
};

// One value a column: float32 or the GEMM's 16-bit dtype, which are told apart at run time.
template <typename TileShape, typename Element>
struct RowVector : fusion::Sm90RowBroadcast<0, TileShape, float>, PlainNode<RowVectorArguments> {
  using Base = fusion::Sm90RowBroadcast<0, TileShape, float>;
  using SharedStorage = typename Base::SharedStorage;
  using Arguments = RowVectorArguments;
  using Params = RowVectorArguments;
  using PlainNode<Params>::to_underlying_arguments;
  using PlainNode<Params>::can_implement;
  using PlainNode<Params>::get_workspace_size;
  using PlainNode<Params>::initialize_workspace;

  CUTLASS_HOST_DEVICE RowVector() {}
  CUTLASS_HOST_DEVICE RowVector(Params const& params, SharedStorage const& storage)
      : Base(typename Base::Params{}, storage), own(params) {}
  CUTLASS_DEVICE bool is_zero() const { return false; }

  Params own;

  template <class Callbacks>
  struct Loads : Callbacks {
    CUTLASS_DEVICE Loads(Callbacks&& base, Params const& own, int first)
        : Callbacks(cute::move(base)), own(own), first(first) {}

    Params own;
    int first;  // column of the tile

    // The tile's values into shared memory; the columns past the end get the default.
    CUTLASS_DEVICE void begin() {
      auto to = cute::filter_zeros(this->tGS_sRow);
      auto coordinates = cute::filter_zeros(this->tGS_cRow, this->tGS_gRow.stride());
      for (int i = 0; i < cute::size(to); ++i) {
        const int col = cute::get<1>(coordinates(i));
        if (col < cute::size<1>(TileShape{})) {
          to(i) = col < cute::get<1>(this->residue_cRow) ? value(first + col) : own.otherwise;
        }
      }
    }

    CUTLASS_DEVICE float value(int col) const {
      if (own.vector.data == nullptr) return own.otherwise;
      if (own.vector.dtype == DType::kFloat32) return static_cast<float const*>(own.vector.data)[col];
      return float(static_cast<Element const*>(own.vector.data)[col]);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    auto base = Base::template get_consumer_store_callbacks<ReferenceSrc>(args);
    const int first = int(cute::get<1>(args.tile_coord_mnkl)) * int(cute::size<1>(TileShape{}));
    return Loads<decltype(base)>(cute::move(base), own, first);
  }
};

// f(std::integral_constant<Activation, ...>) for the activation of the call, the same for the whole grid.
template <typename F>
CUTLASS_DEVICE void with_activation(Activation act, F&& f) {
  if (act == Activation::kGelu) {
    f(std::integral_constant<Activation, Activation::kGelu>{});
  } else if (act == Activation::kGeluTanh) {
    f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  } else if (act == Activation::kQuickGelu) {
    f(std::integral_constant<Activation, Activation::kQuickGelu>{});
  }
}

struct ActivationChoice {
  Activation act = Activation::kNone;
};

// act(h)
template <typename T>
struct Activate {
  using Arguments = ActivationChoice;
};
template <int N>
struct Activate<Array<float, N>> {
  CUTLASS_DEVICE Array<float, N> operator()(Array<float, N> h, ActivationChoice const& args) const {
    with_activation(args.act, [&](auto act) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) h[i] = activate<act(), true>(h[i]);
    });
    return h;
  }
};

// residual + row_scale * layer_scale * (x W^T + bias)
template <typename T>
struct ScaleResidual {};
template <int N>
struct ScaleResidual<Array<float, N>> {
  using Row = Array<float, N>;
  CUTLASS_DEVICE Row operator()(Row v, Row const& bias, Row const& layer_scale, Row const& row_scale,
                                Row const& residual) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) v[i] = fmaf(row_scale[i] * layer_scale[i], v[i] + bias[i], residual[i]);
    return v;
  }
};

// From da and h: returns da * act'(h), and stores act(h) as the auxiliary matrix. `Store` is an Sm90AuxStore.
template <typename Store>
struct ActivationGrad : Store {
  using SharedStorage = typename Store::SharedStorage;

  struct Arguments {
    typename Store::Arguments store;
    Activation act = Activation::kNone;
  };
  struct Params {
    typename Store::Params store;
    Activation act;
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    return {Store::to_underlying_arguments(shape, args.store, workspace), args.act};
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const& shape, Arguments const& args) {
    return Store::can_implement(shape, args.store);
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ActivationGrad() {}
  CUTLASS_HOST_DEVICE ActivationGrad(Params const& params, SharedStorage const& storage)
      : Store(params.store, storage), act(params.act) {}

  Activation act;

  template <class Callbacks>
  struct Grads : Callbacks {
    CUTLASS_DEVICE Grads(Callbacks&& base, Activation act) : Callbacks(cute::move(base)), act(act) {}

    Activation act;

    template <typename Accumulator, typename H, int N>
    CUTLASS_DEVICE Array<float, N> visit(Array<Accumulator, N> const& acc, int epi_v, int epi_m, int epi_n,
                                         Array<float, N> const& da, Array<H, N> const& h) {
      Array<float, N> dh = da, a = cutlass::NumericArrayConverter<float, H, N>{}(h);
      with_activation(act, [&](auto kind) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
          const Gate g = gate<kind(), true>(a[i]);
          dh[i] *= fmaf(a[i], g.slope, g.value);
          a[i] *= g.value;
        }
      });
      Callbacks::visit(acc, epi_v, epi_m, epi_n, a);
      return dh;
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    auto base = Store::template get_consumer_store_callbacks<ReferenceSrc>(args);
    return Grads<decltype(base)>(cute::move(base), act);
  }
};

struct ColumnSumsArguments {
  float* partials = nullptr;  // (tiles down, columns of all tiles); or none are wanted
};

// Passes its input on, and leaves the sums of each tile's columns. For one warpgroup a tile: those of CUTLASS's own
// Sm90RowReduction then lie in local memory. Rows past the end must be zeros.
template <typename TileShape>
struct TileColumnSums : PlainNode<ColumnSumsArguments> {
  static constexpr int kRows = cute::size<0>(TileShape{}), kCols = cute::size<1>(TileShape{});
  using Sums = ColumnSums<kCols>;
  using SharedStorage = typename Sums::Storage;

  CUTLASS_HOST_DEVICE TileColumnSums() {}
  CUTLASS_HOST_DEVICE TileColumnSums(Params const& params, SharedStorage const& storage)
      : partials(params.partials), storage(const_cast<SharedStorage*>(&storage)) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(fusion::ProducerLoadArgs<Args...> const&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  float* partials;
  SharedStorage* storage;

  template <class Coordinates>
  struct Adds : fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Adds(Coordinates coordinates, SharedStorage* storage, float* to, int thread)
        : coordinates(coordinates), storage(storage), to(to), thread(thread) {}

    Coordinates coordinates;  // of the thread's values in the tile, from its first on
    SharedStorage* storage;
    float* to;  // the tile's sums, or null
    int thread;
    Sums sums;

    template <typename Accumulator, int N>
    CUTLASS_DEVICE Array<float, N> visit(Array<Accumulator, N> const&, int epi_v, int epi_m, int epi_n,
                                         Array<float, N> const& input) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        const int column = cute::get<1>(coordinates(cute::_, cute::_, cute::_, epi_m, epi_n)(epi_v * N + i));
        sums.add(column % Sums::kColumns, input[i]);
      }
      return input;
    }

    template <class STensor, class Sync, class Results>
    CUTLASS_DEVICE void reduce(STensor&&, Sync const& sync, int epi_m, int epi_n, bool is_last, Results) {
      if (epi_m + 1 == cute::size<3>(coordinates)) sums.fold(*storage, thread, epi_n * Sums::kColumns);
      if (!is_last) return;
      sync();
      if (to != nullptr) Sums::finish(*storage, thread, to);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    static_assert(cute::size<1>(decltype(args.epi_tile){}) == Sums::kColumns);
    const int64_t row_tile = cute::get<0>(args.tile_coord_mnkl), col_tile = cute::get<1>(args.tile_coord_mnkl);
    const int rows = cute::get<0>(args.problem_shape_mnkl), cols = cute::get<1>(args.problem_shape_mnkl);
    const int64_t stride = (cols + kCols - 1) / kCols * kCols;
    const bool wanted = partials != nullptr && row_tile * kRows < rows;
    float* to = wanted ? partials + row_tile * stride + col_tile * kCols : nullptr;
    return Adds<decltype(args.tCcD)>(args.tCcD, storage, to, args.thread_idx);
  }
};

}  // namespace fastvit::sm90
