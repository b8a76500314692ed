#include "grad.h"
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
    const auto packed = packed_weight(weight, cache, rows.count);
    const Rows target = rows_of(out);
    with_compute_type(packed->data.scalar_type(), [&]<class T>(T) {
      const auto store = [&](const float* products, Range block, int64_t p) {
        store_biased({products, PANEL, block.size(), panel_columns(*packed, p), bias_data + p * PANEL},
                     target_at(target, block.begin, p));
      };
      run_linear<T>(rows, norm, *packed, store, &target);
    });
  }
  return {out.view(with_last(x, weight.size(0))), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_linear_bwd(
    const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& weight, std::array<bool, 5> mask) {
  constexpr const char* op = "layernorm_linear";
  const NoAutograd no_autograd;
  const auto [want_x, want_norm_weight, want_norm_bias, want_weight, want_bias] = mask;
  check_input(op, "x", x);
  check_weight(op, "weight", weight, x.size(-1), "like x");
  check_norm(op, x, norm_weight, norm_bias);
  check_statistics(op, x, mean, rstd);
  check_shape(op, "dout", dout, with_last(x, weight.size(0)), "like the output");

  if (flat_rows(x) == 0) {
    return {zeros_if(want_x, x), zeros_if(want_norm_weight, norm_weight), zeros_if(want_norm_bias, norm_bias),
            zeros_if(want_weight, weight), zeros_if(want_bias, weight.select(1, 0))};
  }
  const Rows rows = rows_of(x), grad = rows_of(dout);
  const int64_t width = rows.width, features = weight.size(0);
  const Tensor dx = empty_if(want_x, x.sizes(), x.options());
  const Tensor dweight = empty_if(want_weight, weight.sizes(), weight.options());
  const Tensor gamma = padded_vector(norm_weight, width, 1), beta = padded_vector(norm_bias, width, 0);
  const RowScale no_scale({}, rows.count);
  const auto dtype = compute_dtype(weight.scalar_type());
  NormInputGrad norm_grad{
      rows,   gamma.const_data_ptr<float>(), mean.const_data_ptr<float>(),      rstd.const_data_ptr<float>(),
      Rows{}, rows_if(want_x, dx),           want_norm_weight || want_norm_bias};
  with_compute_type(dtype, [&]<class T>(T) {
    const GradRows<T> g = scaled_rows<T>(grad, no_scale);
    if (want_x || norm_grad.want_norm) norm_input_grad(g, pack_matrix(weight, dtype), norm_grad);
    if (want_weight) {
      const auto transposed = transposed_norm<T>(rows, mean, rstd, gamma, beta);
      linear_weight_grad(transposed, g, rows.count, features, {rows_of(dweight), nullptr});
    }
  });
  return {dx, vector_grad(want_norm_weight, norm_grad.dnorm_weight, norm_weight),
          vector_grad(want_norm_bias, norm_grad.dnorm_bias, norm_bias), dweight,
          want_bias ? column_sums(grad, no_scale).narrow(0, 0, features).to(weight.scalar_type())
                    : at::empty({0}, weight.options())};
}

}  // namespace fastvit::cpu
