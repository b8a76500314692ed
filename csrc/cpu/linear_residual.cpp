#include "grad.h"
#include "linear.h"
#include "op_checks.h"
#include "ops.h"
#include "pack_cache.h"

namespace fastvit::cpu {

Tensor linear_residual_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                           const OptionalTensor& layer_scale, const OptionalTensor& row_scale, bool cache) {
  constexpr const char* op = "linear_residual";
  const NoAutograd no_autograd;
  check_input(op, "x", x);
  check_weight(op, "weight", weight, x.size(-1), "like x");
  const int64_t features = weight.size(0);
  check_shape(op, "residual", residual, with_last(x, features), "like x and the rows of weight");
  check_shape(op, "bias", bias, {features}, "like the rows of weight");
  check_shape(op, "layer_scale", layer_scale, {features}, "like the rows of weight");
  check_row_scale(op, x, row_scale);

  const Rows rows = rows_of(x), residual_rows = rows_of(residual);
  const Tensor out = at::empty({rows.count, features}, residual.options());
  if (rows.count > 0) {
    const Tensor bias_values = padded_vector(bias, features, 0), scale_values = padded_vector(layer_scale, features, 1);
    const float *bias_data = bias_values.const_data_ptr<float>(), *scale = scale_values.const_data_ptr<float>();
    const RowScale row_factor(row_scale, rows.count);
    const auto packed = packed_weight(weight, cache, rows.count);
    const Rows target = rows_of(out);
    with_compute_type(packed->data.scalar_type(), [&]<class T>(T) {
      const auto store = [&](const float* products, Range block, int64_t p) {
        store_residual({{products, PANEL, block.size(), panel_columns(*packed, p), bias_data + p * PANEL},
                        scale + p * PANEL,
                        row_factor,
                        block.begin,
                        tile_at(residual_rows, block.begin, p),
                        residual_rows.stride(),
                        target_at(target, block.begin, p)});
      };
      run_linear<T>(rows, {}, *packed, store, &target, &residual_rows);
    });
  }
  return out.view(residual.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_residual_bwd(const Tensor& dout, const Tensor& x,
                                                               const Tensor& weight, const OptionalTensor& bias,
                                                               const OptionalTensor& layer_scale,
                                                               const OptionalTensor& row_scale,
                                                               std::array<bool, 4> mask) {
  constexpr const char* op = "linear_residual";
  const NoAutograd no_autograd;
  const auto [want_x, want_weight, want_bias, want_scale] = mask;
  check_input(op, "x", x);
  check_weight(op, "weight", weight, x.size(-1), "like x");
  const int64_t features = weight.size(0);
  check_shape(op, "bias", bias, {features}, "like the rows of weight");
  check_shape(op, "layer_scale", layer_scale, {features}, "like the rows of weight");
  check_row_scale(op, x, row_scale);
  check_shape(op, "dout", dout, with_last(x, features), "like the output");

  if (flat_rows(x) == 0) {
    return {zeros_if(want_x, x), zeros_if(want_weight, weight), zeros_if(want_bias, bias),
            zeros_if(want_scale, layer_scale)};
  }
  const Rows rows = rows_of(x), grad = rows_of(dout);
  const Tensor dx = empty_if(want_x, x.sizes(), x.options());
  const Tensor dweight = empty_if(want_weight, weight.sizes(), weight.options());
  const Tensor scale = padded_vector(layer_scale, features, 1), bias_values = padded_vector(bias, features, 0);
  const RowScale row_factor(row_scale, rows.count);
  const Tensor sums = want_bias || want_scale ? column_sums(grad, row_factor) : Tensor{};
  const Tensor dscale = want_scale ? at::empty({features}, at::kFloat) : Tensor{};
  const auto dtype = compute_dtype(weight.scalar_type());
  with_compute_type(dtype, [&]<class T>(T) {
    const GradRows<T> g = scaled_rows<T>(grad, row_factor);
    if (want_x) {
      const Rows target = rows_of(dx);
      const PackedWeight packed = pack_matrix(weight, dtype, scale.const_data_ptr<float>());
      const auto store = [&](const float* products, Range block, int64_t p) {
        store_biased({products, PANEL, block.size(), panel_columns(packed, p), ZEROS},
                     target_at(target, block.begin, p));
      };
      run_linear<T>(g.rows(features), {}, packed, store, &target);
    }
    if (want_weight || want_scale) {
      const auto transposed = transpose_rows<T>(rows.count, rows.width, [&](int64_t i, float* buffer) {
        scale_row(rows.row(i), rows.dtype(), rows.width, 1.0f, buffer, at::kFloat);
      });
      linear_weight_grad(transposed, g, rows.count, features,
                         {rows_if(want_weight, dweight), scale.const_data_ptr<float>(), rows_of(weight),
                          bias_values.const_data_ptr<float>(), want_scale ? sums.const_data_ptr<float>() : nullptr,
                          want_scale ? dscale.mutable_data_ptr<float>() : nullptr});
    }
  });
  const auto bias_dtype = present(bias) ? bias->scalar_type() : weight.scalar_type();
  return {dx, dweight,
          want_bias ? (sums * scale).narrow(0, 0, features).to(bias_dtype) : at::empty({0}, weight.options()),
          vector_grad(want_scale, dscale, layer_scale)};
}

}  // namespace fastvit::cpu
