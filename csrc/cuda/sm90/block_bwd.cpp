// Glue: the backward of a transformer block in one call, from what fastvit/block_plan/kernels.py kept: the passes and
// products that fastvit/ops/_cuda.py calls one by one, of which it leaves out what is not wanted. Something before the
// MLP is: else there is no such node.
#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "cuda/sm90/attention.h"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/products.h"

namespace fastvit::sm90 {
namespace {

using torch::stable::matmul;

// x, then a block's parameters as fastvit/block_plan/plan.py lists them.
enum Gradient : int {
  kX,
  kNorm1Weight,
  kNorm1Bias,
  kQkvWeight,
  kQkvBias,
  kProjWeight,
  kProjBias,
  kLayerScale1,
  kNorm2Weight,
  kNorm2Bias,
  kFc1Weight,
  kFc1Bias,
  kFc2Weight,
  kFc2Bias,
  kLayerScale2,
  kGradients
};

// Byte for byte as fastvit/block_plan/hopper.py packs it.
struct BlockBwdPlan {
  int64_t batch, tokens, heads;
  float scale;
  Activation act;
  int32_t act_grad_is_small;  // its tile
  int32_t by_triton;          // 0: the attention's gradient is that of attention_bwd.cuh
  uint32_t wanted;            // a bit for each Gradient
  uint32_t reserved;
  CompiledKernel dq, dkv;  // Triton's: delta and dq first

  bool wants(int gradient) const { return wanted >> gradient & 1; }
  // Whether any of those up to `last` is wanted.
  bool wants_up_to(Gradient last) const { return (wanted & ((2u << last) - 1)) != 0; }
};
static_assert(sizeof(BlockBwdPlan) == 496);

Tensor flat(const Checks& checks, const char* name, const Tensor& t) {
  checks.expect(t.dim() == 3 && t.is_contiguous(), [&] {
    return std::string(name) + " has strides " + text(t.strides()) + ", expected none between rows";
  });
  return torch::stable::view(t, {t.size(0) * t.size(1), t.size(2)});
}

// dout^T x
Tensor weight_grad(const Tensor& dout, const Tensor& x) { return matmul(torch::stable::transpose(dout, 0, 1), x); }

// The same in float32: divided by a small LayerScale, a gradient may not fit float16.
Tensor wide_weight_grad(const Tensor& dout, const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(torch::stable::transpose(dout, 0, 1)), from(x), from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// row_scale * layer_scale * (inputs weight^T + bias), and which gradients of its parameters are wanted.
struct Branch {
  const Tensor& weight;
  const MaybeTensor &bias, &layer_scale, &row_scale;
  bool wants_weight, wants_bias, wants_scale;

  ScalarType dtype() const { return weight.scalar_type(); }
  bool reads_inputs() const { return wants_weight || wants_scale; }
  // The dtype of the column sums, where they are read.
  std::optional<ScalarType> sums() const {
    if (!wants_bias && !wants_scale) return std::nullopt;
    return layer_scale ? ScalarType::Float : dtype();
  }
};

class BranchGrad {
 public:
  // dout * row_scale in weight's dtype, and its column sums. LayerScale is left to the smaller weight.
  BranchGrad(const Branch& branch, const Tensor& dout) : branch_(branch), dout_(dout), sums_(nothing(dout)) {
    const std::optional<ScalarType> sums = branch.sums();
    if (branch.row_scale || dout.scalar_type() != branch.dtype()) {
      std::tie(dout_, sums_) = scale(dout, branch.row_scale, {}, branch.dtype(), sums);
    } else if (sums) {
      sums_ = column_sum(dout, *sums);
    }
  }

  // Two factors whose product is the gradient of the inputs.
  std::tuple<Tensor, Tensor> factors() const {
    if (!branch_.layer_scale) return {dout_, branch_.weight};
    // A small LayerScale times a weight can fall below float16, times dout as in eager
    if (branch_.dtype() == ScalarType::Half) return {scaled(dout_, {}, branch_.layer_scale), branch_.weight};
    return {dout_, scaled(branch_.weight, branch_.layer_scale, {})};
  }

  // Of weight, bias and layer_scale.
  std::tuple<Tensor, Tensor, Tensor> of_parameters(const Tensor& inputs) const {
    const Tensor none = nothing(dout_);
    if (!branch_.layer_scale) return {branch_.wants_weight ? weight_grad(dout_, inputs) : none, sums_, none};
    if (!branch_.reads_inputs()) return {none, branch_.wants_bias ? scaled_sums() : none, none};
    return layer_scale_bwd(wide_weight_grad(dout_, inputs), branch_.weight, branch_.bias,
                           branch_.sums() ? MaybeTensor(sums_) : MaybeTensor(), *branch_.layer_scale);
  }

 private:
  Tensor scaled(const Tensor& x, const MaybeTensor& rows, const MaybeTensor& columns) const {
    return std::get<0>(scale(x, rows, columns, branch_.dtype(), std::nullopt));
  }

  Tensor scaled_sums() const {
    const int64_t count = sums_.size(0);
    return torch::stable::view(scaled(torch::stable::view(sums_, {1, count}), {}, branch_.layer_scale), {count});
  }

  const Branch& branch_;
  Tensor dout_, sums_;
};

struct Attention {
  const BlockBwdPlan& plan;
  Tensor qkv, out, lse;  // (B, N, 3 * H * D), (B, N, H * D), (B, H, N)

  Attention(const Checks& checks, const BlockBwdPlan& plan, const Tensor& qkv, const Tensor& out, const Tensor& lse)
      : plan(plan), qkv(qkv), out(out), lse(lse) {
    const auto holds = [&](const Tensor& t, int64_t width) {
      return t.dim() == 3 && t.size(0) == plan.batch && t.size(1) == plan.tokens && t.size(2) == width &&
             t.is_contiguous() && t.scalar_type() == qkv.scalar_type();
    };
    checks.expect(holds(qkv, qkv.size(2)) && holds(out, qkv.size(2) / 3) && lse.is_contiguous() &&
                      lse.scalar_type() == ScalarType::Float && lse.numel() == plan.batch * plan.heads * plan.tokens,
                  [&] { return "qkv has shape " + text(qkv.sizes()) + ", expected the plan's"; });
  }

  // dqkv (B * N, 3 * H * D) of dout (B * N, H * D)
  Tensor backward(const Tensor& dout, const OnDevice& device) const {
    const int64_t width = out.size(2);
    Tensor dqkv = empty(qkv, {plan.batch * plan.tokens, 3 * width}, qkv.scalar_type());
    char *const q = static_cast<char*>(qkv.data_ptr()), *const dq = static_cast<char*>(dqkv.data_ptr());
    char *const k = q + 2 * width, *const v = k + 2 * width, *const dk = dq + 2 * width, *const dv = dk + 2 * width;
    if (plan.by_triton) {
      const Tensor delta = empty(lse, {lse.numel()}, ScalarType::Float);
      void *const saved = lse.data_ptr(), *const sums = delta.data_ptr();
      check_launch("block", launch_compiled(plan.dq, {q, k, v, out.data_ptr(), dout.data_ptr(), dq, saved, sums},
                                            device.stream()));
      check_launch("block",
                   launch_compiled(plan.dkv, {q, k, v, dout.data_ptr(), dk, dv, saved, sums}, device.stream()));
      return dqkv;
    }
    AttentionBwd p{};
    p.batch = plan.batch, p.heads = plan.heads, p.queries = p.keys = plan.tokens, p.dim = width / plan.heads;
    const auto rows = [&](void* data, int64_t stride) { return HeadRows{data, stride, p.dim, plan.tokens * stride}; };
    p.q = rows(q, 3 * width), p.k = rows(k, 3 * width), p.v = rows(v, 3 * width);
    p.dq = rows(dq, 3 * width), p.dk = rows(dk, 3 * width), p.dv = rows(dv, 3 * width);
    p.out = rows(out.data_ptr(), width), p.dout = rows(dout.data_ptr(), width);
    p.lse = static_cast<const float*>(lse.data_ptr()), p.scale = plan.scale, p.device = qkv.get_device_index();
    check_launch("block", qkv.scalar_type() == ScalarType::BFloat16
                              ? launch_attention_bwd<DType::kBFloat16>(p, device.stream())
                              : launch_attention_bwd<DType::kFloat16>(p, device.stream()));
    return dqkv;
  }
};

// What kernels.py's forward kept.
struct Saved {
  const Tensor &mean1, &rstd1, &qkv, &attended, &softmax, &middle, &mean2, &rstd2, &h;
};

// One block's, from its end to its beginning.
class Backward {
 public:
  Backward(const Checks& checks, const BlockBwdPlan& plan, const Saved& saved, const Weights& weights,
           const MaybeTensor& row_scale1, const MaybeTensor& row_scale2)
      : plan_(plan),
        weights_(weights),
        row_scale1_(row_scale1),
        row_scale2_(row_scale2),
        saved_(saved),
        attention_(checks, plan, saved.qkv, saved.attended, saved.softmax),
        merged_(flat(checks, "attended", saved.attended)),
        middle_(flat(checks, "middle", saved.middle)),
        dtype_(saved.qkv.scalar_type()),
        none_(nothing(saved.qkv)),
        grads_(kGradients, none_) {
    checks.expect(plan.wants_up_to(kLayerScale1), [] { return std::string("nothing is wanted before the MLP"); });
    for (const Tensor* weight : {&weights.qkv_weight, &weights.proj_weight, &weights.fc1_weight, &weights.fc2_weight}) {
      checks.expect(weight->scalar_type() == dtype_, [] { return std::string("the weights have several dtypes"); });
    }
  }

  // dout and x (B * N, E)
  std::vector<Tensor> run(const Tensor& dout, const Tensor& x, const OnDevice& device) {
    const Tensor dmiddle = mlp(dout);
    Tensor grad = projection(dmiddle);
    if (!plan_.wants_up_to(kQkvBias)) return grads_;
    grad = attention_.backward(grad, device);  // the projection's is no longer needed
    attention(grad, dmiddle, x);
    return grads_;
  }

 private:
  // The gradient of what goes into the MLP.
  Tensor mlp(const Tensor& dout) {
    const Branch fc2{weights_.fc2_weight,     weights_.fc2_bias,     weights_.layer_scale2,    row_scale2_,
                     plan_.wants(kFc2Weight), plan_.wants(kFc2Bias), plan_.wants(kLayerScale2)};
    const BranchGrad branch(fc2, dout);
    auto [dh, a, dfc1_bias] = through_activation(branch, fc2.reads_inputs());
    grads_[kFc1Bias] = dfc1_bias;
    std::tie(grads_[kFc2Weight], grads_[kFc2Bias], grads_[kLayerScale2]) = branch.of_parameters(a);
    a = none_;  // the largest of what is here, no longer needed
    return norm_linear(dh, middle_, {saved_.mean2, saved_.rstd2, weights_.norm2_weight, weights_.norm2_bias},
                       weights_.fc1_weight, dout, kNorm2Weight);
  }

  // The gradient of fc1's result, the activation's once more where it is read, and fc1's bias's.
  std::tuple<Tensor, Tensor, Tensor> through_activation(const BranchGrad& branch, bool reads_activation) const {
    static constexpr const char* kActs[] = {"gelu", "gelu_tanh", "quick_gelu"};
    const auto [dbranch, weight] = branch.factors();
    return linear_act_grad(dbranch, weight, saved_.h, kActs[int(plan_.act)], reads_activation,
                           plan_.wants(kFc1Bias) ? std::optional(dtype_) : std::nullopt,
                           plan_.act_grad_is_small ? "small" : "large");
  }

  // The gradient of the attention's result.
  Tensor projection(const Tensor& dmiddle) {
    const Branch proj{weights_.proj_weight,     weights_.proj_bias,     weights_.layer_scale1,    row_scale1_,
                      plan_.wants(kProjWeight), plan_.wants(kProjBias), plan_.wants(kLayerScale1)};
    const BranchGrad branch(proj, dmiddle);
    Tensor dattended = none_;
    if (plan_.wants_up_to(kQkvBias)) {
      const auto [dbranch, weight] = branch.factors();
      dattended = matmul(dbranch, weight);
    }
    std::tie(grads_[kProjWeight], grads_[kProjBias], grads_[kLayerScale1]) = branch.of_parameters(merged_);
    return dattended;
  }

  void attention(const Tensor& dqkv, const Tensor& dmiddle, const Tensor& x) {
    if (plan_.wants(kQkvBias)) grads_[kQkvBias] = column_sum(dqkv, dtype_);
    if (!plan_.wants_up_to(kQkvWeight)) return;
    grads_[kX] = norm_linear(dqkv, x, {saved_.mean1, saved_.rstd1, weights_.norm1_weight, weights_.norm1_bias},
                             weights_.qkv_weight, plan_.wants(kX) ? MaybeTensor(dmiddle) : MaybeTensor(), kNorm1Weight);
  }

  struct Norm {
    const Tensor &mean, &rstd;
    const MaybeTensor &weight, &bias;
  };

  // Of linear(norm(x)): x's gradient with dresidual added. Those of the norm's weight and bias and of the linear
  // layer's weight are the three from `first` on.
  Tensor norm_linear(const Tensor& dout, const Tensor& x, const Norm& norm, const Tensor& weight,
                     const MaybeTensor& dresidual, Gradient first) {
    const bool wants_norm = plan_.wants(first) || plan_.wants(first + 1), wants_weight = plan_.wants(first + 2);
    const auto [dx, dnorm_weight, dnorm_bias, y] = layernorm_bwd(
        matmul(dout, weight), x, norm.mean, norm.rstd, norm.weight, norm.bias, dresidual, wants_norm, wants_weight);
    grads_[first] = dnorm_weight, grads_[first + 1] = dnorm_bias;
    if (wants_weight) grads_[first + 2] = weight_grad(dout, y);
    return dx;
  }

  const BlockBwdPlan& plan_;
  const Weights& weights_;
  const MaybeTensor &row_scale1_, &row_scale2_;
  const Saved& saved_;
  Attention attention_;
  Tensor merged_, middle_;  // (B * N, H * D), (B * N, E)
  ScalarType dtype_;
  Tensor none_;
  std::vector<Tensor> grads_;
};

// Every Gradient, anything where it is not wanted; none at all where an argument is not as the plan and the kernels
// want it.
std::vector<Tensor> block_bwd(Tensor dout, Tensor x, Tensor mean1, Tensor rstd1, Tensor qkv, Tensor attended,
                              Tensor softmax, Tensor middle, Tensor mean2, Tensor rstd2, Tensor h,
                              MaybeTensor norm1_weight, MaybeTensor norm1_bias, Tensor qkv_weight, MaybeTensor qkv_bias,
                              Tensor proj_weight, MaybeTensor proj_bias, MaybeTensor layer_scale1,
                              MaybeTensor norm2_weight, MaybeTensor norm2_bias, Tensor fc1_weight, MaybeTensor fc1_bias,
                              Tensor fc2_weight, MaybeTensor fc2_bias, MaybeTensor layer_scale2, MaybeTensor row_scale1,
                              MaybeTensor row_scale2, Tensor plan) try {
  const Checks checks("block", "dout", dout);
  const BlockBwdPlan p = read_plan<BlockBwdPlan>(checks, plan);
  const Saved saved{mean1, rstd1, qkv, attended, softmax, middle, mean2, rstd2, h};
  const Weights weights{norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale1,
                        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight,  fc2_bias,  layer_scale2};
  Backward backward(checks, p, saved, weights, row_scale1, row_scale2);
  const Tensor d = flat(checks, "dout", dout), rows = flat(checks, "x", x);
  checks.same_dtype("dout", checks.dtype("dout", d.scalar_type()), "x", checks.dtype("x", x.scalar_type()));
  const OnDevice device(dout);
  std::vector<Tensor> grads = backward.run(d, rows, device);
  if (p.wants(kX)) grads[kX] = torch::stable::view(grads[kX], x.sizes());
  return grads;
} catch (const Misfit&) {
  return {};
}

}  // namespace
}  // namespace fastvit::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(fastvit_cuda, m) {
  m.def(
      "block_bwd(Tensor dout, Tensor x, Tensor mean1, Tensor rstd1, Tensor qkv, Tensor attended, Tensor softmax,"
      " Tensor middle, Tensor mean2, Tensor rstd2, Tensor h, " FASTVIT_BLOCK_WEIGHTS
      ", Tensor? row_scale1, Tensor? row_scale2, Tensor plan) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) { m.impl("block_bwd", TORCH_BOX(&fastvit::sm90::block_bwd)); }
