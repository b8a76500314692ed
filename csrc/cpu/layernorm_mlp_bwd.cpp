// Backward of layernorm_mlp. With G = row_scale * dout, a = act(h), dH = (G layer_scale W2) * act'(h):
//   dW2 = layer_scale * G^T a     dW1 = dH^T LN(x)     dLN = dH W1
// One task takes 64 hidden columns over all rows: it makes a and dH for them in L2 and uses them up for both weight
// gradients; only dH is written out, for dLN.
#include "grad.h"
#include "op_checks.h"
#include "ops.h"

namespace fastvit::cpu {
namespace {

constexpr int64_t TILE_ROWS = 128;  // even

template <class T>
struct MlpBackward {
  Rows h;                             // (M, F)
  GradRows<T> g;                      // (M, E)
  TransposedRows<T> g_transposed;     // no storage when dW2 and dlayer_scale are not wanted
  TransposedRows<T> norm_transposed;  // no storage when dW1 is not wanted
  Rows fc2_weight;                    // (E, F) in T
  const float* layer_scale;           // (E, padded)
  Activation act;
  int64_t width;

  // Results; no rows or null when not wanted.
  GradRows<T> dh;  // (M, F padded)
  T* dh_data;
  Rows dfc1_weight, dfc2_weight;
  float *dfc1_bias, *dlayer_scale;  // (F, padded), (panels of F, E): parts of <W2, G^T a>

  bool want_dh() const { return dh_data || dfc1_weight.count > 0 || dfc1_bias; }
  bool want_fc2() const { return dfc2_weight.count > 0 || dlayer_scale; }
};

// a and dH of 64 columns for a chunk of rows as the GEMM's right operands.
template <class T>
struct ChunkPanels {
  float *da, *activated_tile, *dh_tile;
  T *activated, *dh;
  explicit ChunkPanels(Scratch& scratch)
      : da(scratch.take<float>(TILE_ROWS * PANEL)),
        activated_tile(scratch.take<float>(TILE_ROWS * PANEL)),
        dh_tile(scratch.take<float>(TILE_ROWS * PANEL)),
        activated(scratch.take<T>(MAX_ROW_CHUNK * PANEL)),
        dh(scratch.take<T>(MAX_ROW_CHUNK * PANEL)) {}
};

// Into the panels, at once where a tile lies as a panel does.
template <class T>
void fill_panels(ActivationGradTile<T> tile, Activation act, const ChunkPanels<T>& panels) {
  if (sizeof(T) == 2 || !packs_narrow()) return activation_backward(tile, act);
  if constexpr (sizeof(T) == 4) {
    float *activated = tile.activated, *dh = tile.dh;
    tile.activated = panels.activated_tile;
    tile.dh = panels.dh_tile;
    activation_backward(tile, act);
    pack_panel(tile.activated, PANEL, PANEL, tile.rows, nullptr, activated);
    pack_panel(tile.dh, PANEL, PANEL, tile.rows, nullptr, dh);
  }
}

// a and dH of panel `p` for a chunk of rows.
template <class T>
void hidden_chunk(const MlpBackward<T>& args, Range chunk, int64_t p, const T* fc2_panel, double* dh_sum,
                  const ChunkPanels<T>& panels) {
  const int64_t columns = std::min(PANEL, args.h.width - p * PANEL);
  for (int64_t r0 = chunk.begin; r0 < chunk.end; r0 += TILE_ROWS) {
    const int64_t count = std::min(TILE_ROWS, chunk.end - r0), at = (r0 - chunk.begin) * PANEL;
    if (args.want_dh()) {
      gemm_panel<T>({args.g.data + r0 * args.g.ld, args.g.ld, fc2_panel, panels.da, PANEL, count,
                     padded_k<T>(args.width), false});
    } else {
      std::fill_n(panels.da, count * PANEL, 0.0f);
    }
    T* dh_rows = args.dh_data ? args.dh_data + r0 * args.dh.ld + p * PANEL : nullptr;
    fill_panels<T>({panels.da, tile_at(args.h, r0, p), args.h.stride(), args.h.dtype(), count, columns,
                    panels.activated + at, panels.dh + at, dh_rows, args.dh.ld, dh_sum},
                   args.act, panels);
  }
}

template <class T>
void store_fc2_grads(const MlpBackward<T>& args, int64_t p, const float* sums) {
  const int64_t columns = std::min(PANEL, args.h.width - p * PANEL);
  for (int64_t e = 0; e < args.width; ++e) {
    if (args.dlayer_scale) {
      args.dlayer_scale[p * args.width + e] =
          dot_row(tile_at(args.fc2_weight, e, p), args.fc2_weight.dtype(), sums + e * PANEL, columns);
    }
    if (args.dfc2_weight.count > 0) {
      scale_row(sums + e * PANEL, at::kFloat, columns, args.layer_scale[e], target_at(args.dfc2_weight, e, p).data,
                args.dfc2_weight.dtype());
    }
  }
}

template <class T>
void hidden_panel(const MlpBackward<T>& args, int64_t p) {
  const int64_t n0 = p * PANEL, columns = std::min(PANEL, args.h.width - n0), rows = args.h.count, width = args.width;
  Scratch scratch;
  const ChunkPanels<T> chunk_panels(scratch);
  T* fc2_panel = scratch.take<T>(padded_k<T>(width) * PANEL);
  float* fc1_sums = scratch.take<float>(width * PANEL);  // (E, 64) of dW1^T
  float* fc2_sums = scratch.take<float>(width * PANEL);  // (E, 64) of G^T a
  double* dh_sum = scratch.take<double>(PANEL);
  std::fill_n(dh_sum, PANEL, 0.0);
  if (args.want_dh()) {
    pack_panel(static_cast<const T*>(tile_at(args.fc2_weight, 0, p)), args.fc2_weight.stride(), columns, width,
               args.layer_scale, fc2_panel);
  }
  for (int64_t c = 0; c < row_chunks(rows); ++c) {
    const Range chunk = row_chunk(rows, c);
    const int64_t k = padded_k<T>(chunk.size());
    hidden_chunk(args, chunk, p, fc2_panel, dh_sum, chunk_panels);
    if (args.want_fc2()) {
      gemm_tile(
          {args.g_transposed.chunk(c), args.g_transposed.ld, chunk_panels.activated, fc2_sums, PANEL, width, k, c > 0});
    }
    if (args.dfc1_weight.count > 0) {
      gemm_tile(
          {args.norm_transposed.chunk(c), args.norm_transposed.ld, chunk_panels.dh, fc1_sums, PANEL, width, k, c > 0});
    }
  }
  gemm_release<T>();
  if (args.want_fc2()) store_fc2_grads(args, p, fc2_sums);
  if (args.dfc1_bias) std::copy_n(dh_sum, PANEL, args.dfc1_bias + n0);
  if (args.dfc1_weight.count > 0) {
    store_transposed({fc1_sums, width, columns, nullptr, args.dfc1_weight.mutable_row(n0), args.dfc1_weight.stride(),
                      args.dfc1_weight.dtype()});
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_mlp_bwd(
    const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& h,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& row_scale, const std::string& act, bool residual, std::array<bool, 8> mask) {
  constexpr const char* op = "layernorm_mlp";
  const NoAutograd no_autograd;
  const auto [want_x, want_norm_weight, want_norm_bias, want_fc1, want_fc1_bias, want_fc2, want_fc2_bias, want_scale] =
      mask;
  const Activation activation = parse_activation(op, act);
  check_input(op, "x", x);
  check_norm(op, x, norm_weight, norm_bias);
  check_mlp_weights(op, x, fc1_weight, fc2_weight);
  check_shape(op, "fc2_bias", fc2_bias, {x.size(-1)}, "like x");
  check_shape(op, "layer_scale", layer_scale, {x.size(-1)}, "like x");
  check_row_scale(op, x, row_scale);
  check_statistics(op, x, mean, rstd);
  check_shape(op, "dout", dout, x.sizes(), "like x");
  check_shape(op, "h", h, {flat_rows(x), fc1_weight.size(0)}, "like the rows of x and of fc1_weight");

  if (flat_rows(x) == 0) {
    return {zeros_if(want_x, x),
            zeros_if(want_norm_weight, norm_weight),
            zeros_if(want_norm_bias, norm_bias),
            zeros_if(want_fc1, fc1_weight),
            zeros_if(want_fc1_bias, fc1_weight.select(1, 0)),
            zeros_if(want_fc2, fc2_weight),
            zeros_if(want_fc2_bias, fc2_bias),
            zeros_if(want_scale, layer_scale)};
  }
  const Rows rows = rows_of(x), grad = rows_of(dout);
  const int64_t width = rows.width, hidden = fc1_weight.size(0), panels = ceil_div(hidden, PANEL);
  const bool want_norm = want_norm_weight || want_norm_bias, want_input = want_x || want_norm;
  const Tensor dx = empty_if(want_x, x.sizes(), x.options());
  const Tensor dfc1 = empty_if(want_fc1, fc1_weight.sizes(), fc1_weight.options());
  const Tensor dfc2 = empty_if(want_fc2, fc2_weight.sizes(), fc2_weight.options());
  const Tensor gamma = padded_vector(norm_weight, width, 1), beta = padded_vector(norm_bias, width, 0);
  const Tensor scale = padded_vector(layer_scale, width, 1);
  const RowScale row_factor(row_scale, rows.count);
  const Tensor dfc1_bias = at::empty({want_fc1_bias ? panels * PANEL : 0}, at::kFloat);
  const Tensor scale_parts = at::empty({want_scale ? panels : 0, width}, at::kFloat);
  const auto dtype = compute_dtype(fc1_weight.scalar_type());
  NormInputGrad norm_grad{rows,
                          gamma.const_data_ptr<float>(),
                          mean.const_data_ptr<float>(),
                          rstd.const_data_ptr<float>(),
                          rows_if(residual, dout),
                          rows_if(want_x, dx),
                          want_norm};
  with_compute_type(dtype, [&]<class T>(T) {
    const int64_t dh_ld = operand_ld<T>(panels * PANEL);
    const Tensor dh = at::empty({want_input ? rows.count : 0, dh_ld}, dtype);
    MlpBackward<T> args{rows_of(h), scaled_rows<T>(grad, row_factor)};
    args.fc2_weight = rows_of(packable(fc2_weight, dtype));
    args.layer_scale = scale.const_data_ptr<float>();
    args.act = activation;
    args.width = width;
    args.dh = {dh, dh.const_data_ptr<T>(), dh_ld};
    args.dh_data = want_input ? dh.mutable_data_ptr<T>() : nullptr;
    args.dfc1_weight = rows_if(want_fc1, dfc1);
    args.dfc2_weight = rows_if(want_fc2, dfc2);
    args.dfc1_bias = want_fc1_bias ? dfc1_bias.mutable_data_ptr<float>() : nullptr;
    args.dlayer_scale = want_scale ? scale_parts.mutable_data_ptr<float>() : nullptr;
    if (args.want_fc2()) {
      args.g_transposed = transpose_rows<T>(rows.count, width, [&](int64_t i, float* buffer) {
        scale_row(grad.row(i), grad.dtype(), width, row_factor(i), buffer, at::kFloat);
      });
    }
    if (want_fc1) args.norm_transposed = transposed_norm<T>(rows, mean, rstd, gamma, beta);
    if (args.want_dh() || args.want_fc2()) {
      parallel_tasks(panels, [&](int64_t p) { hidden_panel(args, p); });
    }
    if (want_input) norm_input_grad(args.dh, pack_matrix(fc1_weight, dtype), norm_grad);
  });

  const Tensor sums = want_fc2_bias || want_scale ? column_sums(grad, row_factor) : Tensor{};
  const Tensor bias = padded_vector(fc2_bias, width, 0);
  const Tensor dscale = want_scale ? sum_partials(scale_parts) + (bias * sums).narrow(0, 0, width) : Tensor{};
  return {dx,
          vector_grad(want_norm_weight, norm_grad.dnorm_weight, norm_weight),
          vector_grad(want_norm_bias, norm_grad.dnorm_bias, norm_bias),
          dfc1,
          want_fc1_bias ? dfc1_bias.narrow(0, 0, hidden).to(fc1_weight.scalar_type()) : dfc1_bias,
          dfc2,
          vector_grad(want_fc2_bias, want_fc2_bias ? sums * scale : Tensor{}, fc2_bias),
          vector_grad(want_scale, dscale, layer_scale)};
}

}  // namespace fastvit::cpu
