// Patch embedding as a GEMM over patches, which are gathered and normalised block by block; never an im2col in memory.
#include "dtypes.h"
#include "grad.h"
#include "op_checks.h"
#include "ops.h"
#include "pack_cache.h"
#include "patches.h"

namespace fastvit::cpu {

Patches::Patches(const Tensor& images, const Tensor& weight, const OptionalTensor& mean, const OptionalTensor& std)
    : images(images),
      height(weight.size(2)),
      width(weight.size(3)),
      rows(images.size(2) / height),
      columns(images.size(3) / width),
      scale(images.size(1)),
      shift(images.size(1)) {
  const auto values = [&](const OptionalTensor& of, float missing) {
    return present(of) ? of->to(at::kFloat).contiguous() : at::full({images.size(1)}, missing, at::kFloat);
  };
  const Tensor means = values(mean, 0), stds = values(std, 1);
  const double unit = images.scalar_type() == at::kByte ? 1.0 / 255 : 1.0;
  for (int64_t c = 0; c < images.size(1); ++c) {
    const double deviation = stds.const_data_ptr<float>()[c];
    scale[c] = static_cast<float>(unit / deviation);
    shift[c] = static_cast<float>(-means.const_data_ptr<float>()[c] / deviation);
  }
}

namespace {

constexpr const char* op = "patch_embed";

template <class T>
Operand<T> load_patches(const Patches& patches, Range range, Scratch& scratch) {
  const int64_t pixels = patches.pixels(), ld = operand_ld<T>(pixels);
  T* operand = scratch.take<T>(range.size() * ld);
  float* buffer = scratch.take<float>(pixels + LANES);
  for (int64_t i = range.begin; i < range.end; ++i) {
    T* out = operand + (i - range.begin) * ld;
    gather_patch(patches, i, buffer);
    scale_row(buffer, at::kFloat, pixels, 1.0f, out, c10::CppTypeToScalarType<T>::value);
    for (int64_t k = pixels; k < padded_k<T>(pixels); ++k) out[k] = 0.0f;
  }
  return {operand, ld};
}

// dimages = scale * dpatches, of one tile of 64 columns.
template <class S>
void scatter_tile(const Patches& patches, const float* products, Range rows, int64_t first_column, int64_t columns,
                  const Tensor& dimages) {
  const int64_t area = patches.height * patches.width;
  int64_t offsets[PANEL];
  float scales[PANEL];
  for (int64_t n = 0; n < columns; ++n) {
    const int64_t column = first_column + n, c = column / area, y = column % area / patches.width;
    offsets[n] = c * dimages.stride(1) + y * dimages.stride(2) + column % patches.width * dimages.stride(3);
    scales[n] = patches.scale[c];
  }
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    S* patch = static_cast<S*>(dimages.mutable_data_ptr()) + patches.origin(i);
    const float* row = products + (i - rows.begin) * PANEL;
    for (int64_t n = 0; n < columns; ++n) patch[offsets[n]] = static_cast<S>(row[n] * scales[n]);
  }
}

void check_patches(const Tensor& images, const Tensor& weight, const OptionalTensor& mean, const OptionalTensor& std) {
  TORCH_CHECK_VALUE(images.defined() && images.device().is_cpu(), op, ": images is not on the CPU");
  if (images.scalar_type() != at::kByte) check_tensor(op, "images", images);
  check_tensor(op, "weight", weight);
  TORCH_CHECK_VALUE(images.dim() == 4, op, ": images has shape ", shape_text(images.sizes()),
                    ", expected (B, C, IH, IW)");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == images.size(1) && weight.numel() > 0, op,
                    ": weight has shape ", shape_text(weight.sizes()), ", expected (E, ", images.size(1), ", PH, PW)");
  TORCH_CHECK_VALUE(images.size(2) % weight.size(2) == 0 && images.size(3) % weight.size(3) == 0 &&
                        images.size(2) > 0 && images.size(3) > 0,
                    op, ": images are ", images.size(2), " x ", images.size(3),
                    " pixels, expected multiples of the patch, ", weight.size(2), " x ", weight.size(3));
  check_shape(op, "mean", mean, {images.size(1)}, "like the channels of images");
  check_shape(op, "std", std, {images.size(1)}, "like the channels of images");
}

// Rows of pos_embed (L, E) or (T + L, E) and of prefix (T, E), in the dtype of weight.
struct TokenTables {
  Tensor pos_embed, prefix;
  int64_t num_prefix, first_patch_row;  // the latter: row of pos_embed that the first patch takes

  TokenTables(const Tensor& weight, const OptionalTensor& pos, const OptionalTensor& tokens, int64_t patches)
      : num_prefix(present(tokens) ? tokens->size(0) : 0), first_patch_row(0) {
    const int64_t features = weight.size(0);
    if (present(tokens)) {
      check_shape(op, "prefix", tokens, {num_prefix, features}, "like the rows of weight");
      prefix = tokens->to(weight.scalar_type());
    }
    if (!present(pos)) return;
    const bool on_patches = pos->dim() == 2 && pos->size(0) == patches;
    check_shape(op, "pos_embed", pos, {patches + (on_patches ? 0 : num_prefix), features}, "for the tokens");
    first_patch_row = on_patches ? 0 : num_prefix;
    pos_embed = pos->to(weight.scalar_type()).contiguous();
  }

  void write_prefix(const Tensor& out) const {
    if (num_prefix == 0) return;
    const bool positioned = pos_embed.defined() && first_patch_row > 0;
    out.narrow(1, 0, num_prefix).copy_(positioned ? prefix + pos_embed.narrow(0, 0, num_prefix) : prefix);
  }
};

// (E, C * PH * PW). A view that is made below autograd would count versions by itself: it counts them with the weight.
Tensor as_matrix(const Tensor& weight) {
  const Tensor matrix = weight.reshape({weight.size(0), -1});
  if (matrix.is_alias_of(weight) && !weight.is_inference()) {
    matrix.unsafeGetTensorImpl()->set_version_counter(weight.unsafeGetTensorImpl()->version_counter());
  }
  return matrix;
}

struct PatchTile {
  const PackedWeight& weight;
  const float *bias, *ones;  // (E, padded)
  const TokenTables& tables;
  const Tensor& out;  // (B, T + L, E)
  int64_t per_image;
};

// Rows of a block that belong to one image lie side by side in `out`.
void store_patches(const PatchTile& args, const float* products, Range rows, int64_t p) {
  const RowScale no_scale({}, 0);
  const int64_t features = args.out.size(2), item = args.out.element_size();
  for (int64_t i = rows.begin; i < rows.end;) {
    const int64_t image = i / args.per_image, patch = i % args.per_image;
    const int64_t count = std::min(rows.end, (image + 1) * args.per_image) - i;
    const int64_t token = image * args.out.size(1) + args.tables.num_prefix + patch;
    const char* position = nullptr;
    if (args.tables.pos_embed.defined()) {
      position = static_cast<const char*>(args.tables.pos_embed.const_data_ptr()) +
                 ((args.tables.first_patch_row + patch) * features + p * PANEL) * item;
    }
    char* target = static_cast<char*>(args.out.mutable_data_ptr()) + (token * features + p * PANEL) * item;
    store_residual(
        {{products + (i - rows.begin) * PANEL, PANEL, count, panel_columns(args.weight, p), args.bias + p * PANEL},
         args.ones + p * PANEL,
         no_scale,
         0,
         position,
         features,
         {target, features, args.out.scalar_type()}});
    i += count;
  }
}

}  // namespace

Tensor patch_embed_fwd(const Tensor& images, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& pos_embed, const OptionalTensor& prefix, const OptionalTensor& mean,
                       const OptionalTensor& std, bool cache) {
  const NoAutograd no_autograd;
  check_patches(images, weight, mean, std);
  const int64_t features = weight.size(0);
  check_shape(op, "bias", bias, {features}, "like the rows of weight");
  const Patches patches(images, weight, mean, std);
  const TokenTables tables(weight, pos_embed, prefix, patches.per_image());
  const Tensor out = at::empty({images.size(0), tables.num_prefix + patches.per_image(), features}, weight.options());
  if (images.size(0) == 0) return out;
  tables.write_prefix(out);
  const Tensor matrix = as_matrix(weight);
  const auto packed = packed_weight(matrix, cache && matrix.is_alias_of(weight), patches.count());
  const Tensor bias_values = padded_vector(bias, features, 0), ones = padded_vector({}, features, 1);
  const PatchTile tile{
      *packed, bias_values.const_data_ptr<float>(), ones.const_data_ptr<float>(), tables, out, patches.per_image()};
  with_compute_type(packed->data.scalar_type(), [&]<class T>(T) {
    run_gemm<T>(
        patches.count(), *packed, [&](Range rows, Scratch& scratch) { return load_patches<T>(patches, rows, scratch); },
        [&](const float* products, Range rows, int64_t p) { store_patches(tile, products, rows, p); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> patch_embed_bwd(const Tensor& dout, const Tensor& images, const Tensor& weight,
                                                   int64_t num_prefix, const OptionalTensor& mean,
                                                   const OptionalTensor& std, std::array<bool, 3> mask) {
  const NoAutograd no_autograd;
  const auto [want_images, want_weight, want_tokens] = mask;
  check_patches(images, weight, mean, std);
  const int64_t features = weight.size(0);
  const Patches patches(images, weight, mean, std);
  check_shape(op, "dout", dout, {images.size(0), num_prefix + patches.per_image(), features}, "like the output");
  TORCH_CHECK_VALUE(!want_images || images.scalar_type() != at::kByte, op, ": images is uint8, which has no gradient");

  const Tensor dimages = want_images ? at::empty(images.sizes(), images.options()) : at::empty({0}, at::kFloat);
  const Tensor dweight = empty_if(want_weight, weight.sizes(), weight.options());
  const Tensor token_sum = want_tokens ? dout.sum(0, false, at::kFloat) : at::empty({0}, at::kFloat);
  if (images.size(0) == 0) {
    dweight.zero_();
    return {dimages, dweight, token_sum};
  }
  const Rows grad = rows_of(dout.narrow(1, num_prefix, patches.per_image()));
  const Tensor matrix = weight.reshape({features, -1});
  const auto dtype = compute_dtype(weight.scalar_type());
  with_compute_type(dtype, [&]<class T>(T) {
    const GradRows<T> g = scaled_rows<T>(grad, RowScale({}, grad.count));
    if (want_weight) {
      const auto transposed = transpose_rows<T>(
          patches.count(), patches.pixels(), [&](int64_t i, float* buffer) { gather_patch(patches, i, buffer); },
          LANES);
      linear_weight_grad(transposed, g, grad.count, features, {rows_of(dweight.view({features, -1})), nullptr});
    }
    if (want_images) {
      Patches target = patches;
      target.images = dimages;
      const PackedWeight packed = pack_matrix(matrix, dtype);
      run_linear<T>(g.rows(features), {}, packed, [&](const float* products, Range rows, int64_t p) {
        FASTVIT_BY_DTYPE(dimages.scalar_type(), scatter_tile, target, products, rows, p * PANEL,
                         panel_columns(packed, p), dimages);
      });
    }
  });
  return {dimages, dweight, token_sum};
}

}  // namespace fastvit::cpu
