// The MLP's activation and its derivative, with the bias gradient as a column sum of the same pass.
#include "cuda/pass.cuh"

namespace fastvit {

// Every activation here is h * gate(h); its derivative is gate + h * gate'.
struct Gate {
  float value, slope;
};

__device__ inline Gate sigmoid_gate(float z, float dz) {
  const float s = 1.f / (1.f + expf(-z));
  return {s, s * (1.f - s) * dz};
}

// 16-bit results: reciprocal and exponential of the special function unit, exact to about 2^-21.
__device__ inline Gate fast_sigmoid_gate(float z, float dz) {
  const float s = __fdividef(1.f, 1.f + __expf(-z));
  return {s, s * (1.f - s) * dz};
}

constexpr float kTanhScale = 0.7978845608f, kTanhCubic = 0.044715f;  // sqrt(2 / pi)

template <Activation ACT, bool FAST>
__device__ inline Gate gate(float h) {
  if constexpr (ACT == Activation::kQuickGelu) {
    return FAST ? fast_sigmoid_gate(1.702f * h, 1.702f) : sigmoid_gate(1.702f * h, 1.702f);
  } else if constexpr (ACT == Activation::kGeluTanh) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    const float z = 2.f * kTanhScale * h * (1.f + kTanhCubic * h * h);
    const float dz = 2.f * kTanhScale * (1.f + 3.f * kTanhCubic * h * h);
    return FAST ? fast_sigmoid_gate(z, dz) : sigmoid_gate(z, dz);
  } else if constexpr (FAST) {
    // The normal distribution by Abramowitz and Stegun 7.1.26: below 1e-7 from erf, where erff would cost more
    // than the memory traffic. The exponential is also the derivative's.
    const float e = __expf(-0.5f * h * h);
    const float t = __fdividef(1.f, 1.f + 0.3275911f * 0.7071067812f * fabsf(h));
    const float poly =
        t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * poly * e;
    return {h > 0.f ? 1.f - tail : tail, 0.3989422804f * e};
  } else {
    return {0.5f + 0.5f * erff(0.7071067812f * h), 0.3989422804f * expf(-0.5f * h * h)};
  }
}

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
    for (int i = 0; i < N; ++i) v[i] *= gate<ACT, sizeof(T) == 2>(v[i]).value;
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
