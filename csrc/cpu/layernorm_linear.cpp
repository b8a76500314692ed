#include "linear.h"
#include "op_checks.h"
#include "ops.h"
#include "pack_cache.h"

namespace fastvit::cpu {

std::tuple<Tensor, Tensor, Tensor> layernorm_linear_fwd(const Tensor& x, const OptionalTensor& norm_weight,
                                                        const OptionalTensor& norm_bias, const Tensor& weight,
                                                        const OptionalTensor& bias, double eps, bool cache) {
  constexpr const char* op = "layernorm_linear";
  const NoAutograd no_autograd;
  check_input(op, "x", x);
  check_weight(op, "weight", weight, x.size(-1), "like x");
  check_norm(op, x, norm_weight, norm_bias);
  check_shape(op, "bias", bias, {weight.size(0)}, "like the rows of weight");

  const Rows rows = rows_of(x);
  const Tensor mean = at::empty({rows.count}, at::kFloat), rstd = at::empty_like(mean);
  const Tensor out = at::empty({rows.count, weight.size(0)}, weight.options());
  if (rows.count > 0) {
    const Tensor gamma = padded_vector(norm_weight, rows.width, 1), beta = padded_vector(norm_bias, rows.width, 0);
    const Tensor bias_values = padded_vector(bias, weight.size(0), 0);
    const Norm norm{gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), static_cast<float>(eps),
                    mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>()};
    const float* bias_data = bias_values.const_data_ptr<float>();
    const auto packed = packed_weight(weight, cache);
    const Rows target = rows_of(out);
    with_compute_type(*packed, [&]<class T>(T) {
      run_linear<T>(rows, norm, *packed, [&](const float* products, Range block, int64_t p) {
        store_biased({products, PANEL, block.size(), panel_columns(*packed, p), bias_data + p * PANEL},
                     target_at(target, block.begin, p));
      });
    });
  }
  return {out.view(with_last(x, weight.size(0))), mean, rstd};
}

}  // namespace fastvit::cpu
