#include "linear.h"
#include "op_checks.h"
#include "ops.h"
#include "pack_cache.h"

namespace fastvit::cpu {
namespace {

constexpr int64_t HIDDEN_CHUNK = 768;   // hidden columns between fc1 and fc2: 96 rows of them take 288 KB of L2
constexpr int64_t MIN_FUSED_ROWS = 32;  // with fewer rows a thread, splitting the columns of each GEMM is faster

struct MlpForward {
  Rows x, out, h;  // h has no rows unless it is saved
  Norm norm;
  PackedWeightPtr fc1, fc2;
  const float *fc1_bias, *fc2_bias, *layer_scale;  // padded to panels
  const RowScale& row_scale;
  Activation act;
  bool residual;

  void store_hidden(const float* products, Range rows, int64_t p, const TileTarget& activated) const {
    const TileTarget saved = h.count > 0 ? target_at(h, rows.begin, p) : TileTarget{};
    store_activated({products, PANEL, rows.size(), panel_columns(*fc1, p), fc1_bias + p * PANEL}, act, activated,
                    saved);
  }

  void store_out(const float* products, Range rows, int64_t p) const {
    store_residual({{products, PANEL, rows.size(), panel_columns(*fc2, p), fc2_bias + p * PANEL},
                    layer_scale + p * PANEL,
                    row_scale,
                    rows.begin,
                    residual ? tile_at(x, rows.begin, p) : nullptr,
                    x.stride(),
                    target_at(out, rows.begin, p)});
  }
};

// Both GEMMs on one block of rows: the hidden values never leave L2.
template <class T>
void mlp_rows(const MlpForward& args, Range rows) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t count = rows.size(), ld = operand_ld<T>(HIDDEN_CHUNK), hidden_size = padded_k<T>(args.fc2->k);
  Scratch scratch;
  float* products = scratch.take<float>(count * PANEL);
  float* sums = scratch.take<float>(args.fc2->panels * count * PANEL);  // (panels, rows, 64)
  T* hidden = scratch.take<T>(count * ld);
  const Operand<T> a = load_operand<T>(args.x, args.norm, rows, scratch);

  for (int64_t f0 = 0; f0 < hidden_size; f0 += HIDDEN_CHUNK) {
    const int64_t width = std::min(HIDDEN_CHUNK, hidden_size - f0);
    for (int64_t f = 0; f < width; f += PANEL) {
      const int64_t p = (f0 + f) / PANEL;
      const T* next = f + PANEL < width ? args.fc1->panel<T>(p + 1) : args.fc2->panel<T>(0) + f0 * PANEL;
      GemmTile<T> tile{a.data, a.ld, args.fc1->panel<T>(p), products, PANEL, count, padded_k<T>(args.fc1->k), false,
                       PANEL,  next};
      if (args.h.count > 0) tile.written = lines_at(&args.h, rows.begin, p);
      gemm_panel<T>(tile);
      args.store_hidden(products, rows, p, {hidden + f, ld, dtype});
    }
    const bool last = f0 + width == hidden_size;
    const T* next_fc1 = last ? nullptr : args.fc1->panel<T>((f0 + width) / PANEL);
    for (int64_t p = 0; p < args.fc2->panels; ++p) {
      float* out = sums + p * count * PANEL;
      const T* next = p + 1 < args.fc2->panels ? args.fc2->panel<T>(p + 1) + f0 * PANEL : next_fc1;
      GemmTile<T> tile{hidden, ld, args.fc2->panel<T>(p) + f0 * PANEL, out, PANEL, count, width, f0 > 0, PANEL, next};
      if (last) {
        tile.written = lines_at(&args.out, rows.begin, p);
        tile.read = lines_at(args.residual ? &args.x : nullptr, rows.begin, p);
      }
      gemm_tile(tile);
      if (last) args.store_out(out, rows, p);
    }
  }
  gemm_release<T>();
}

// One GEMM after the other, each split over rows and columns.
template <class T>
void mlp_two_passes(const MlpForward& args) {
  const Rows hidden = rows_of(at::empty({args.x.count, args.fc1->n}, args.fc1->data.options()));
  run_linear<T>(
      args.x, args.norm, *args.fc1,
      [&](const float* products, Range rows, int64_t p) {
        args.store_hidden(products, rows, p, target_at(hidden, rows.begin, p));
      },
      &hidden, args.h.count > 0 ? &args.h : nullptr);
  run_linear<T>(
      hidden, {}, *args.fc2, [&](const float* products, Range rows, int64_t p) { args.store_out(products, rows, p); },
      &args.out, args.residual ? &args.x : nullptr);
}

template <class T>
void mlp_forward(const MlpForward& args) {
  if (args.x.count < MIN_FUSED_ROWS * at::get_num_threads()) return mlp_two_passes<T>(args);
  const int64_t blocks = plan_row_blocks(args.x.count);
  parallel_tasks(blocks, [&](int64_t i) { mlp_rows<T>(args, piece(args.x.count, blocks, i)); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_mlp_fwd(const Tensor& x, const OptionalTensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& fc1_weight,
                                                             const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                                                             const OptionalTensor& fc2_bias,
                                                             const OptionalTensor& layer_scale,
                                                             const OptionalTensor& row_scale, const std::string& act,
                                                             double eps, bool residual, bool save, bool cache) {
  constexpr const char* op = "layernorm_mlp";
  const NoAutograd no_autograd;
  const Activation activation = parse_activation(op, act);
  check_input(op, "x", x);
  check_norm(op, x, norm_weight, norm_bias);
  check_mlp_weights(op, x, fc1_weight, fc2_weight);
  check_shape(op, "fc1_bias", fc1_bias, {fc1_weight.size(0)}, "like the rows of fc1_weight");
  check_shape(op, "fc2_bias", fc2_bias, {x.size(-1)}, "like x");
  check_shape(op, "layer_scale", layer_scale, {x.size(-1)}, "like x");
  check_row_scale(op, x, row_scale);

  const Rows rows = rows_of(x);
  const int64_t hidden = fc1_weight.size(0), width = rows.width;
  const Tensor mean = at::empty({rows.count}, at::kFloat), rstd = at::empty_like(mean);
  const Tensor out = at::empty({rows.count, width}, x.options());
  const Tensor h = at::empty({save ? rows.count : 0, hidden}, fc1_weight.options());
  if (rows.count > 0) {
    const Tensor gamma = padded_vector(norm_weight, width, 1), beta = padded_vector(norm_bias, width, 0);
    const Tensor bias1 = padded_vector(fc1_bias, hidden, 0), bias2 = padded_vector(fc2_bias, width, 0);
    const Tensor scale = padded_vector(layer_scale, width, 1);
    const RowScale row_factor(row_scale, rows.count);
    const Norm norm{gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), static_cast<float>(eps),
                    mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>()};
    const MlpForward args{rows,
                          rows_of(out),
                          rows_of(h),
                          norm,
                          packed_weight(fc1_weight, cache, rows.count),
                          packed_weight(fc2_weight, cache, rows.count),
                          bias1.const_data_ptr<float>(),
                          bias2.const_data_ptr<float>(),
                          scale.const_data_ptr<float>(),
                          row_factor,
                          activation,
                          residual};
    with_compute_type(args.fc1->data.scalar_type(), [&]<class T>(T) { mlp_forward<T>(args); });
  }
  return {out.view(x.sizes()), mean, rstd, save ? h : at::empty({0}, fc1_weight.options())};
}

}  // namespace fastvit::cpu
