// Glue: the backward of a transformer block in one call, from what fastvit/block_plan/kernels.py kept: the passes and
// products that fastvit/ops/_cuda.py calls one by one. Without LayerScale, and with every gradient wanted.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/sm90/attention.h"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/products.h"

namespace fastvit::sm90 {
namespace {

// Byte for byte as fastvit/block_plan/hopper.py packs it.
struct BlockBwdPlan {
  int64_t batch, tokens, heads;
  float scale;
  Activation act;
  int32_t act_grad_is_small;                        // its tile
  int32_t by_triton;                                // 0: the attention's gradient is that of attention_bwd.cuh
  int32_t qkv_bias, proj_bias, fc1_bias, fc2_bias;  // whether there is one
  CompiledKernel dq, dkv;                           // Triton's: delta and dq first
};
static_assert(sizeof(BlockBwdPlan) == 504);

Tensor flat(const Checks& checks, const char* name, const Tensor& t) {
  checks.expect(t.dim() == 3 && t.is_contiguous(), [&] {
    return std::string(name) + " has strides " + text(t.strides()) + ", expected none between rows";
  });
  return torch::stable::view(t, {t.size(0) * t.size(1), t.size(2)});
}

// dout^T x
Tensor weight_grad(const Tensor& dout, const Tensor& x) {
  return torch::stable::matmul(torch::stable::transpose(dout, 0, 1), x);
}

Tensor column_sum_if(bool wanted, const Tensor& x) { return wanted ? column_sum(x, x.scalar_type()) : nothing(x); }

// dout * row_scale in the dtype of the weights, and its column sums where they are wanted.
std::tuple<Tensor, Tensor> branch_grad(const Tensor& dout, const MaybeTensor& row_scale, ScalarType dtype,
                                       bool wants_sums) {
  if (!row_scale && dout.scalar_type() == dtype) return {dout, column_sum_if(wants_sums, dout)};
  return scale(dout, row_scale, {}, dtype, wants_sums ? std::optional(dtype) : std::nullopt);
}

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

// Gradients of x, norm1's weight and bias, qkv's, the projection's, norm2's, fc1's and fc2's, empty for a bias that
// there is not; no gradients at all where an argument is not as the plan and the kernels want it.
std::vector<Tensor> block_bwd(Tensor dout, Tensor x, Tensor mean1, Tensor rstd1, Tensor qkv, Tensor attended,
                              Tensor softmax, Tensor middle, Tensor mean2, Tensor rstd2, Tensor h, Tensor norm1_weight,
                              Tensor norm1_bias, Tensor qkv_weight, Tensor proj_weight, Tensor norm2_weight,
                              Tensor norm2_bias, Tensor fc1_weight, Tensor fc2_weight, MaybeTensor row_scale1,
                              MaybeTensor row_scale2, Tensor plan) try {
  using torch::stable::matmul;
  const Checks checks("block", "dout", dout);
  const BlockBwdPlan p = read_plan<BlockBwdPlan>(checks, plan);
  const Attention attention(checks, p, qkv, attended, softmax);
  const Tensor d = flat(checks, "dout", dout), x_rows = flat(checks, "x", x), mid = flat(checks, "middle", middle);
  const Tensor merged = flat(checks, "attended", attended);
  const ScalarType dtype = qkv_weight.scalar_type();
  checks.same_dtype("dout", checks.dtype("dout", d.scalar_type()), "x", checks.dtype("x", x.scalar_type()));
  const char* const acts[] = {"gelu", "gelu_tanh", "quick_gelu"};
  const OnDevice device(dout);

  const auto [dmlp, dfc2_bias] = branch_grad(d, row_scale2, dtype, p.fc2_bias);
  auto [dh, a, dfc1_bias] =
      linear_act_grad(dmlp, fc2_weight, h, acts[int(p.act)], true, p.fc1_bias ? std::optional(dtype) : std::nullopt,
                      p.act_grad_is_small ? "small" : "large");
  const Tensor dfc2_weight = weight_grad(dmlp, a);
  a = nothing(a);  // the largest of what is here, no longer needed
  const auto [dmid, dnorm2_weight, dnorm2_bias, y2] =
      layernorm_bwd(matmul(dh, fc1_weight), mid, mean2, rstd2, norm2_weight, norm2_bias, d, true, true);
  const Tensor dfc1_weight = weight_grad(dh, y2);
  dh = nothing(dh);

  const auto [dproj, dproj_bias] = branch_grad(dmid, row_scale1, dtype, p.proj_bias);
  const Tensor dproj_weight = weight_grad(dproj, merged);
  const Tensor dqkv = attention.backward(matmul(dproj, proj_weight), device);
  const auto [dx, dnorm1_weight, dnorm1_bias, y1] =
      layernorm_bwd(matmul(dqkv, qkv_weight), x_rows, mean1, rstd1, norm1_weight, norm1_bias, dmid, true, true);
  return {torch::stable::view(dx, x.sizes()),
          dnorm1_weight,
          dnorm1_bias,
          weight_grad(dqkv, y1),
          column_sum_if(p.qkv_bias, dqkv),
          dproj_weight,
          dproj_bias,
          dnorm2_weight,
          dnorm2_bias,
          dfc1_weight,
          dfc1_bias,
          dfc2_weight,
          dfc2_bias};
} catch (const Misfit&) {
  return {};
}

}  // namespace
}  // namespace fastvit::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(fastvit_cuda, m) {
  m.def(
      "block_bwd(Tensor dout, Tensor x, Tensor mean1, Tensor rstd1, Tensor qkv, Tensor attended, Tensor softmax,"
      " Tensor middle, Tensor mean2, Tensor rstd2, Tensor h, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight,"
      " Tensor proj_weight, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor fc2_weight,"
      " Tensor? row_scale1, Tensor? row_scale2, Tensor plan) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) { m.impl("block_bwd", TORCH_BOX(&fastvit::sm90::block_bwd)); }
