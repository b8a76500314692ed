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
    const auto packed = packed_weight(weight, cache);
    const Rows target = rows_of(out);
    with_compute_type(*packed, [&]<class T>(T) {
      run_linear<T>(rows, {}, *packed, [&](const float* products, Range block, int64_t p) {
        store_residual({{products, PANEL, block.size(), panel_columns(*packed, p), bias_data + p * PANEL},
                        scale + p * PANEL,
                        row_factor,
                        block.begin,
                        tile_at(residual_rows, block.begin, p),
                        residual_rows.stride(),
                        target_at(target, block.begin, p)});
      });
    });
  }
  return out.view(residual.sizes());
}

}  // namespace fastvit::cpu
