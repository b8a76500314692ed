#include "grad.h"

namespace fastvit::cpu {
namespace {

// Rows a partial sum of the norm's gradients covers. It depends on the size only, never on the threads.
int64_t norm_group_rows(int64_t rows) { return rows < 4096 ? 16 : ROW_GROUP; }

// dY W for a block of rows: (panels, rows, 64) float32
template <class T>
float* product_rows(const GradRows<T>& dy, const PackedWeight& weight, Range rows, Scratch& scratch) {
  const int64_t count = rows.size(), k_size = padded_k<T>(weight.k);
  float* sums = scratch.take<float>(weight.panels * count * PANEL);
  for (int64_t k = 0; k < k_size; k += K_BLOCK) {
    const int64_t size = std::min(K_BLOCK, k_size - k);
    for (int64_t p = 0; p < weight.panels; ++p) {
      const T* next = p + 1 < weight.panels ? weight.panel<T>(p + 1) + k * PANEL : nullptr;
      gemm_tile({dy.data + rows.begin * dy.ld + k, dy.ld, weight.panel<T>(p) + k * PANEL, sums + p * count * PANEL,
                 PANEL, count, size, k > 0, PANEL, next});
    }
  }
  gemm_release<T>();
  return sums;
}

}  // namespace

at::Tensor sum_partials(const at::Tensor& partials) {
  const int64_t width = partials.size(1);
  const at::Tensor total = at::zeros({width}, at::kDouble);
  for (int64_t i = 0; i < partials.size(0); ++i) {
    add_to(total.mutable_data_ptr<double>(), partials.const_data_ptr<float>() + i * width, width);
  }
  return total.to(at::kFloat);
}

at::Tensor column_sums(const Rows& dout, const RowScale& row_scale) {
  const int64_t padded = round_up(dout.width, PANEL), groups = ceil_div(dout.count, ROW_GROUP);
  const at::Tensor partials = at::zeros({groups, padded}, at::kFloat);
  float* data = partials.mutable_data_ptr<float>();
  parallel_tasks(groups, [&](int64_t group) {
    Scratch scratch;
    float* buffer = scratch.take<float>(dout.width);
    double* sums = scratch.take<double>(dout.width);
    std::fill_n(sums, dout.width, 0.0);
    for (int64_t i = group * ROW_GROUP; i < std::min(dout.count, (group + 1) * ROW_GROUP); ++i) {
      scale_row(dout.row(i), dout.dtype(), dout.width, row_scale(i), buffer, at::kFloat);
      add_to(sums, buffer, dout.width);
    }
    std::copy_n(sums, dout.width, data + group * padded);
  });
  return sum_partials(partials);
}

template <class T>
void linear_weight_grad(const TransposedRows<T>& x, const GradRows<T>& g, int64_t rows, int64_t features,
                        const LinearWeightGrad& out) {
  parallel_tasks(ceil_div(features, PANEL), [&](int64_t p) {
    const int64_t n0 = p * PANEL, columns = std::min(PANEL, features - n0);
    Scratch scratch;
    T* panel = scratch.take<T>(padded_k<T>(MAX_ROW_CHUNK) * PANEL);
    float* sums = scratch.take<float>(x.width * PANEL);  // (E, 64)
    for (int64_t c = 0; c < row_chunks(rows); ++c) {
      const Range chunk = row_chunk(rows, c);
      pack_panel(g.data + chunk.begin * g.ld + n0, g.ld, columns, chunk.size(), nullptr, panel);
      gemm_tile({x.chunk(c), x.ld, panel, sums, PANEL, x.width, padded_k<T>(chunk.size()), c > 0});
    }
    gemm_release<T>();
    if (out.dlayer_scale) {
      float* unscaled = scratch.take<float>(PANEL * x.width);
      store_transposed({sums, x.width, columns, nullptr, unscaled, x.width, at::kFloat});
      for (int64_t n = 0; n < columns; ++n) {
        const int64_t i = n0 + n;
        const float dot = dot_row(out.weight.row(i), out.weight.dtype(), unscaled + n * x.width, x.width);
        out.dlayer_scale[i] = dot + out.bias[i] * out.column_sums[i];
      }
    }
    if (out.dweight.count > 0) {
      const float* scale = out.layer_scale ? out.layer_scale + n0 : nullptr;
      store_transposed(
          {sums, x.width, columns, scale, out.dweight.mutable_row(n0), out.dweight.stride(), out.dweight.dtype()});
    }
  });
}

template <class T>
void norm_input_grad(const GradRows<T>& dy, const PackedWeight& weight, NormInputGrad& args) {
  const int64_t rows = args.x.count, width = args.x.width, padded = round_up(width, PANEL);
  const int64_t group_rows = norm_group_rows(rows), groups = ceil_div(rows, group_rows);
  const at::Tensor partials = at::zeros({2, args.want_norm ? groups : 0, padded}, at::kFloat);
  float* dweight = partials.mutable_data_ptr<float>();
  float* dbias = dweight + groups * padded;
  const int64_t blocks = std::min(plan_row_blocks(rows), groups);
  parallel_tasks(blocks, [&](int64_t task) {
    const Range block = piece(groups, blocks, task);
    const Range range{block.begin * group_rows, std::min(rows, block.end * group_rows)};
    Scratch scratch;
    const float* sums = product_rows(dy, weight, range, scratch);
    float* dnorm = scratch.take<float>(padded);
    float* x_buffer = scratch.take<float>(width);
    float* residual_buffer = scratch.take<float>(width);
    for (int64_t i = range.begin; i < range.end; ++i) {
      for (int64_t p = 0; p < weight.panels; ++p) {
        std::copy_n(sums + (p * range.size() + i - range.begin) * PANEL, PANEL, dnorm + p * PANEL);
      }
      const int64_t partial = i / group_rows * padded;
      normalize_row_backward({args.x.as_float(i, x_buffer),
                              dnorm,
                              args.norm_weight,
                              args.residual_grad.count > 0 ? args.residual_grad.as_float(i, residual_buffer) : nullptr,
                              {args.mean[i], args.rstd[i]},
                              width,
                              args.want_norm ? dweight + partial : nullptr,
                              args.want_norm ? dbias + partial : nullptr,
                              args.dx.count > 0 ? args.dx.mutable_row(i) : nullptr,
                              args.dx.count > 0 ? args.dx.dtype() : at::kFloat});
    }
  });
  if (args.want_norm) {
    args.dnorm_weight = sum_partials(partials[0]);
    args.dnorm_bias = sum_partials(partials[1]);
  }
}

template void linear_weight_grad(const TransposedRows<float>&, const GradRows<float>&, int64_t, int64_t,
                                 const LinearWeightGrad&);
template void linear_weight_grad(const TransposedRows<c10::BFloat16>&, const GradRows<c10::BFloat16>&, int64_t, int64_t,
                                 const LinearWeightGrad&);
template void norm_input_grad(const GradRows<float>&, const PackedWeight&, NormInputGrad&);
template void norm_input_grad(const GradRows<c10::BFloat16>&, const PackedWeight&, NormInputGrad&);

}  // namespace fastvit::cpu
