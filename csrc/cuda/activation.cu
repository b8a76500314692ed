// The MLP's activation and its derivative, with the bias gradient as a column sum of the same pass.
#include "cuda/activation.h"
#include "cuda/pass.cuh"

namespace fastvit {

template <typename T, Activation ACT, int N>
struct ActFwdOp {
  static constexpr bool kMaySum = false;
  using Loaded = Packed<T, N>;
  Matrix h, a;

  __device__ int columns(int64_t) const { return 0; }
  __device__ Loaded load(int64_t row, int64_t col) const { return load_packed<N>(row_of<const T>(h, row) + col); }
  __device__ void run(int64_t row, int64_t col, const Loaded& in, int, float (&)[N]) const {
    float v[N];
    unpack(in, v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activate<ACT, sizeof(T) == 2>(v[i]);
    store(row_of<T>(a, row) + col, v);
  }
};

template <typename T, Activation ACT, int N>
struct ActBwdOp {
  static constexpr bool kMaySum = true;
  struct Loaded {
    Packed<T, N> da, h;
  };
  Matrix da, h, a;

  __device__ int columns(int64_t) const { return 0; }
  __device__ Loaded load(int64_t row, int64_t col) const {
    return {load_packed<N>(row_of<const T>(da, row) + col), load_packed<N>(row_of<const T>(h, row) + col)};
  }
  __device__ void run(int64_t row, int64_t col, const Loaded& in, int, float (&sums)[N]) const {
    float dh[N], v[N];
    unpack(in.da, dh);
    unpack(in.h, v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Gate g = gate<ACT, sizeof(T) == 2>(v[i]);
      dh[i] *= g.value + v[i] * g.slope;
      v[i] *= g.value;
      sums[i] += dh[i];
    }
    store(row_of<T>(da, row) + col, dh);
    if (a.data != nullptr) store(row_of<T>(a, row) + col, v);
  }
};

template <typename F>
cudaError_t with_activation(Activation act, F&& f) {
  switch (act) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kQuickGelu:
      return f(std::integral_constant<Activation, Activation::kQuickGelu>{});
    case Activation::kNone:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_act_fwd(const ActFwd& p, cudaStream_t stream) {
  return with_type(p.h.dtype, [&](auto type) {
    return with_activation(p.act, [&](auto act) {
      using T = typename decltype(type)::type;
      if (p.pass.cols % kVec == 0 && aligned(p.h) && aligned(p.a)) {
        return launch_pass<kVec>(ActFwdOp<T, act(), kVec>{p.h, p.a}, p.pass, stream);
      }
      return launch_pass<1>(ActFwdOp<T, act(), 1>{p.h, p.a}, p.pass, stream);
    });
  });
}

cudaError_t launch_act_bwd(const ActBwd& p, cudaStream_t stream) {
  return with_type(p.h.dtype, [&](auto type) {
    return with_activation(p.act, [&](auto act) {
      using T = typename decltype(type)::type;
      if (p.pass.cols % kVec == 0 && aligned(p.da) && aligned(p.h) && aligned(p.a)) {
        return launch_pass<kVec>(ActBwdOp<T, act(), kVec>{p.da, p.h, p.a}, p.pass, stream);
      }
      return launch_pass<1>(ActBwdOp<T, act(), 1>{p.da, p.h, p.a}, p.pass, stream);
    });
  });
}

}  // namespace fastvit
