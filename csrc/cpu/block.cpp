#include "op_checks.h"
#include "ops.h"

namespace fastvit::cpu {
namespace {

// `parts` (B, N, parts * H * D) as (parts, B, H, N, D)
Tensor heads_of(const Tensor& rows, int64_t parts, int64_t num_heads) {
  return rows.view({rows.size(0), rows.size(1), parts, num_heads, rows.size(2) / (parts * num_heads)})
      .permute({2, 0, 3, 1, 4});
}

OptionalTensor rows_from(const OptionalTensor& vector, int64_t first, int64_t count) {
  return present(vector) ? OptionalTensor(vector->narrow(0, first, count)) : OptionalTensor();
}

}  // namespace

Tensor block_fwd(const Tensor& x, const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,
                 const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& proj_weight,
                 const OptionalTensor& proj_bias, const OptionalTensor& layer_scale1,
                 const OptionalTensor& norm2_weight, const OptionalTensor& norm2_bias, const Tensor& fc1_weight,
                 const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                 const OptionalTensor& layer_scale2, int64_t num_heads, double scale, double eps1, double eps2,
                 const std::string& act, bool cache, bool class_token) {
  constexpr const char* op = "block";
  const NoAutograd no_autograd;
  check_input(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": x has shape ", shape_text(x.sizes()), ", expected (B, N, E)");
  check_weight(op, "qkv_weight", qkv_weight, x.size(-1), "like x");
  TORCH_CHECK_VALUE(num_heads >= 1 && qkv_weight.size(0) % (3 * num_heads) == 0, op, ": qkv_weight has shape ",
                    shape_text(qkv_weight.sizes()), ", expected (3 H D, E) for H = ", num_heads, " heads");

  const auto project = [&](const Tensor& rows, int64_t first, int64_t count) {
    const int64_t width = qkv_weight.size(0) / 3;
    const Tensor weight = qkv_weight.narrow(0, first * width, count * width);
    const OptionalTensor bias = rows_from(qkv_bias, first * width, count * width);
    return heads_of(std::get<0>(layernorm_linear_fwd(rows, norm1_weight, norm1_bias, weight, bias, eps1, cache)), count,
                    num_heads);
  };
  // The class token alone: its query, and keys and values of all
  const Tensor residual = class_token ? x.narrow(1, 0, 1) : x;
  const Tensor qkv = project(x, class_token ? 1 : 0, class_token ? 2 : 3);
  const Tensor q = class_token ? project(residual, 0, 1)[0] : qkv[0], k = qkv[-2], v = qkv[-1];

  const Tensor attended = std::get<0>(attention_fwd(q, k, v, {}, false, scale));
  const Tensor tokens = attended.transpose(1, 2).flatten(2);  // as it lies in memory
  const Tensor sum = linear_residual_fwd(tokens, proj_weight, proj_bias, residual, layer_scale1, {}, cache);
  return std::get<0>(layernorm_mlp_fwd(sum, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
                                       layer_scale2, {}, act, eps2, true, false, cache));
}

}  // namespace fastvit::cpu
