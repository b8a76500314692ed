#include "op_checks.h"
#include "ops.h"

namespace fastvit::cpu {

Tensor block_fwd(const Tensor& x, const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,
                 const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& proj_weight,
                 const OptionalTensor& proj_bias, const OptionalTensor& layer_scale1,
                 const OptionalTensor& norm2_weight, const OptionalTensor& norm2_bias, const Tensor& fc1_weight,
                 const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                 const OptionalTensor& layer_scale2, int64_t num_heads, double scale, double eps1, double eps2,
                 const std::string& act, bool cache) {
  constexpr const char* op = "block";
  const NoAutograd no_autograd;
  check_input(op, "x", x);
  check_weight(op, "qkv_weight", qkv_weight, x.size(-1), "like x");
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": x has shape ", shape_text(x.sizes()), ", expected (B, N, E)");
  TORCH_CHECK_VALUE(num_heads >= 1 && qkv_weight.size(0) % (3 * num_heads) == 0, op, ": qkv_weight has shape ",
                    shape_text(qkv_weight.sizes()), ", expected (3 H D, E) for H = ", num_heads, " heads");
  const int64_t head_dim = qkv_weight.size(0) / (3 * num_heads);

  const Tensor qkv = std::get<0>(layernorm_linear_fwd(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps1, cache));
  const Tensor heads = qkv.view({x.size(0), x.size(1), 3, num_heads, head_dim}).permute({2, 0, 3, 1, 4});
  const Tensor attended = std::get<0>(attention_fwd(heads[0], heads[1], heads[2], {}, false, scale));
  const Tensor tokens = attended.transpose(1, 2).flatten(2);  // as it lies in memory
  const Tensor sum = linear_residual_fwd(tokens, proj_weight, proj_bias, x, layer_scale1, {}, cache);
  return std::get<0>(layernorm_mlp_fwd(sum, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
                                       layer_scale2, {}, act, eps2, true, false, cache));
}

}  // namespace fastvit::cpu
