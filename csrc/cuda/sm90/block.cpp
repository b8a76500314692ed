// Glue: a transformer block in one call. With a small batch the host's way to an op takes longer than its kernel runs;
// here it is gone once a block, in inference with two allocations. fastvit/block_plan makes the plan.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cuda/sm90/attention.h"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/products.h"

namespace fastvit::sm90 {
namespace {

// What is the same for all calls of one kind, byte for byte as fastvit/block_plan/hopper.py packs it.
struct BlockPlan {
  int64_t batch, tokens, width, attended, hidden, heads;  // B, N, E, H * D, F, H
  float eps1, eps2, scale;
  Activation act;
  int32_t class_token;  // 1: of token 0 alone, as keys and values are of all
  int32_t by_triton;    // 0: the attention is that of attention.cuh
  Tile query, packed, proj, fc1, fc2;
  uint32_t reserved;
  CompiledKernel compiled;  // Triton's attention

  int64_t rows() const { return batch * tokens; }
  int64_t kept() const { return class_token ? batch : rows(); }  // rows of queries, and of all that follows
};
static_assert(sizeof(BlockPlan) == 320);

struct Norm {
  Vector weight, bias;
  float eps;
};

struct Linear {
  Matrix weight;  // (cols, depth)
  Vector bias, layer_scale;
  int64_t cols, depth;
  Tile tile;
};

// x (B, N, E) as (B * N, E), where its strides allow.
Matrix rows_of(const Checks& checks, const Tensor& x, const BlockPlan& plan) {
  checks.expect(x.dim() == 3 && x.size(0) == plan.batch && x.size(1) == plan.tokens && x.size(2) == plan.width,
                [&] { return "x has shape " + text(x.sizes()) + ", expected the plan's"; });
  checks.expect(plan.rows() > 0 && plan.rows() < (int64_t(1) << 31),
                [&] { return "x has " + std::to_string(plan.rows()) + " rows, expected 1 to 2147483647"; });
  const bool joined = plan.batch == 1 || x.stride(0) == plan.tokens * x.stride(1);
  checks.expect(x.stride(2) == 1 && joined, [&] { return "x has strides " + text(x.strides()); });
  const Matrix rows{x.data_ptr(), x.stride(1), checks.dtype("x", x.scalar_type())};
  return tma(checks, "x", rows, plan.width);
}

Norm norm(const Checks& checks, const MaybeTensor& weight, const MaybeTensor& bias, int64_t cols, float eps,
          DType dtype) {
  const Norm read{checks.vector("norm_weight", weight, cols, dtype, "x"),
                  checks.vector("norm_bias", bias, cols, dtype, "x"), eps};
  if (weight && bias) checks.same_dtype("norm_weight", read.weight.dtype, "norm_bias", read.bias.dtype);
  return read;
}

Linear linear(const Checks& checks, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& layer_scale,
              int64_t cols, int64_t depth, Tile tile, DType dtype) {
  const Matrix read = checks.matrix("weight", weight, cols, depth, "the plan");
  const Vector added = checks.vector("bias", bias, cols, dtype, "weight");
  if (bias) checks.same_dtype("bias", added.dtype, "weight", dtype);
  const Vector scale = checks.vector("layer_scale", layer_scale, cols, dtype, "weight");
  return {tma(checks, "weight", read, depth, dtype), added, scale, cols, depth, tile};
}

// One allocation for everything between x and the result.
class Workspace {
 public:
  Workspace(const Tensor& like, std::initializer_list<int64_t> bytes) {
    int64_t total = 0;
    for (const int64_t part : bytes) total += rounded(part);
    memory_ = empty(like, {total}, ScalarType::Byte);
    next_ = static_cast<char*>(memory_.data_ptr());
  }

  char* take(int64_t bytes) {
    char* part = next_;
    next_ += rounded(bytes);
    return part;
  }

 private:
  static int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  Tensor memory_;
  char* next_;
};

struct Parts {
  Norm norm1;
  Linear qkv, proj;
  Norm norm2;
  Linear fc1, fc2;
};

// Some of the outputs of a linear layer.
Linear outputs(const Linear& all, int64_t first, int64_t count, Tile tile) {
  const auto past = [&](void* data, int64_t elements, DType dtype) {
    return data == nullptr ? nullptr : static_cast<char*>(data) + elements * (dtype == DType::kFloat32 ? 4 : 2);
  };
  Linear part = all;
  part.weight.data = past(all.weight.data, first * all.weight.stride, all.weight.dtype);
  part.bias.data = past(all.bias.data, first, all.bias.dtype);
  part.cols = count, part.tile = tile;
  return part;
}

struct Statistics {
  float *mean, *rstd;
};

// The kernels of one block, on one stream.
struct Run {
  const BlockPlan& plan;
  cudaStream_t stream;
  int device;

  void layernorm(int64_t rows, const Matrix& x, const Norm& norm, const Matrix& y, const Statistics& of) const {
    LayerNormFwd p{};
    p.x = x, p.y = y, p.weight = norm.weight, p.bias = norm.bias;
    p.mean = of.mean, p.rstd = of.rstd;
    p.rows = rows, p.cols = int(plan.width), p.eps = norm.eps;
    check_launch("block", launch_layernorm_fwd(p, stream));
  }

  void linear_act(int64_t rows, const Matrix& x, const Linear& linear, Activation act, const Matrix& y,
                  const Matrix& h = {}) const {
    LinearAct p{};
    p.x = x, p.weight = linear.weight, p.bias = linear.bias, p.h = h, p.y = y, p.act = act;
    p.rows = rows, p.cols = linear.cols, p.depth = linear.depth, p.tile = linear.tile, p.device = device;
    run("block", p, stream);
  }

  // row_scale  (rows,) or nullptr
  void linear_residual(int64_t rows, const Matrix& x, const Linear& linear, const Matrix& residual, const Matrix& y,
                       const float* row_scale = nullptr) const {
    LinearResidual p{};
    p.x = x, p.weight = linear.weight, p.bias = linear.bias, p.layer_scale = linear.layer_scale;
    p.row_scale = row_scale, p.residual = residual, p.y = y;
    p.rows = rows, p.cols = linear.cols, p.depth = linear.depth, p.tile = linear.tile, p.device = device;
    run("block", p, stream);
  }

  // Keys and values lie side by side in a row, behind the queries unless these have rows of their own.
  void attend(char* q, char* k, char* out, float* saved, DType dtype) const {
    char* const v = k + 2 * plan.attended;
    if (plan.by_triton) {
      check_launch("block", launch_compiled(plan.compiled, {q, k, v, out, saved}, stream));
      return;
    }
    const int64_t queries = plan.kept() / plan.batch, dim = plan.attended / plan.heads;
    const int64_t q_row = (plan.class_token ? 1 : 3) * plan.attended, row = (plan.class_token ? 2 : 3) * plan.attended;
    AttentionFwd p{};
    p.q = {q, q_row, dim, queries * q_row}, p.k = {k, row, dim, plan.tokens * row},
    p.v = {v, row, dim, plan.tokens * row};
    p.out = out, p.lse = saved;
    p.batch = plan.batch, p.heads = plan.heads, p.queries = queries, p.keys = plan.tokens, p.dim = dim;
    p.scale = plan.scale, p.device = device;
    check_launch("block", dtype == DType::kBFloat16 ? launch_attention_fwd<DType::kBFloat16>(p, stream)
                                                    : launch_attention_fwd<DType::kFloat16>(p, stream));
  }
};

Tensor run_block(const Checks& checks, const BlockPlan& plan, const Tensor& x, const Parts& parts) {
  const Matrix input = rows_of(checks, x, plan);
  const DType dtype = parts.qkv.weight.dtype;
  checks.fits("x", input.dtype, "weight", dtype);
  const int64_t rows = plan.rows(), kept = plan.kept(), attended = plan.attended;
  const int64_t q_bytes = 2 * kept * attended, kv_bytes = 4 * rows * attended, attended_bytes = q_bytes;
  const int64_t hidden_bytes = std::max(q_bytes + kv_bytes + attended_bytes, 2 * kept * plan.hidden);
  const int64_t middle_bytes = (input.dtype == dtype ? 2 : 4) * kept * plan.width;
  const int64_t norm_bytes = 8 * rows, saved_bytes = 4 * kept * plan.heads;  // a number a query and head
  const int64_t normed_bytes = plan.class_token ? 2 * rows * plan.width : 0;

  const OnDevice device(x);
  const Tensor out = empty(x, {plan.batch, kept / plan.batch, plan.width}, x.scalar_type());
  Workspace workspace(x, {hidden_bytes, middle_bytes, norm_bytes, saved_bytes, normed_bytes});
  // fc1's result goes where q, k, v and the attention's were; LayerNorm's into the result, which fc2 alone writes over.
  // Kernels may start before the one before them ends, but none writes before that: a buffer's last reader is done.
  char* const q = workspace.take(hidden_bytes);
  const Matrix merged{q + q_bytes + kv_bytes, attended, dtype}, a{q, plan.hidden, dtype};
  const Matrix middle{workspace.take(middle_bytes), plan.width, input.dtype};
  const Matrix result{out.data_ptr(), plan.width, input.dtype}, normed{out.data_ptr(), plan.width, dtype};
  const Run run{plan, device.stream(), x.get_device_index()};
  float* const means = reinterpret_cast<float*>(workspace.take(norm_bytes));
  const Statistics unread{means, means + rows};
  float* const saved = reinterpret_cast<float*>(workspace.take(saved_bytes));

  Matrix residual = input;
  if (plan.class_token) {
    const Matrix all{workspace.take(normed_bytes), plan.width, dtype};
    const Matrix first{all.data, plan.tokens * all.stride, dtype};
    run.layernorm(rows, input, parts.norm1, all, unread);
    run.linear_act(kept, first, outputs(parts.qkv, 0, attended, plan.query), Activation::kNone, {q, attended, dtype});
    run.linear_act(rows, all, outputs(parts.qkv, attended, 2 * attended, plan.packed), Activation::kNone,
                   {q + q_bytes, 2 * attended, dtype});
    run.attend(q, q + q_bytes, static_cast<char*>(merged.data), saved, dtype);
    residual.stride *= plan.tokens;
  } else {
    run.layernorm(rows, input, parts.norm1, normed, unread);
    run.linear_act(rows, normed, parts.qkv, Activation::kNone, {q, 3 * attended, dtype});
    run.attend(q, q + 2 * attended, static_cast<char*>(merged.data), saved, dtype);
  }
  run.linear_residual(kept, merged, parts.proj, residual, middle);
  run.layernorm(kept, middle, parts.norm2, normed, unread);
  run.linear_act(kept, normed, parts.fc1, plan.act, a);
  run.linear_residual(kept, a, parts.fc2, middle, result);
  return out;
}

// DropPath's factor of each sample, for each of its rows in float32.
class RowFactors {
 public:
  RowFactors(const Checks& checks, const MaybeTensor& row_scale, const BlockPlan& plan, DType dtype) {
    checks.vector("row_scale", row_scale, plan.batch, dtype, "weight");
    if (!row_scale) return;
    factors_ = empty(*row_scale, {plan.batch, plan.tokens}, ScalarType::Float);
    torch::stable::copy_(*factors_, torch::stable::unsqueeze(*row_scale, 1));
  }
  const float* data() const { return factors_ ? static_cast<const float*>(factors_->data_ptr()) : nullptr; }

 private:
  MaybeTensor factors_;
};

// The result, and what a backward reads: mean and rstd of norm1, qkv, the attention's result and its log-sum-exp, what
// goes into the MLP, mean and rstd of norm2, fc1's result.
std::vector<Tensor> run_block_saving(const Checks& checks, const BlockPlan& plan, const Tensor& x, const Parts& parts,
                                     const MaybeTensor& row_scale1, const MaybeTensor& row_scale2) {
  const Matrix input = rows_of(checks, x, plan);
  const DType dtype = parts.qkv.weight.dtype;
  checks.fits("x", input.dtype, "weight", dtype);
  checks.expect(!plan.class_token, [] { return std::string("the plan is the class token's"); });
  const int64_t rows = plan.rows(), attended = plan.attended;
  const ScalarType half = dtype == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;

  const OnDevice device(x);
  const RowFactors factors1(checks, row_scale1, plan, dtype), factors2(checks, row_scale2, plan, dtype);
  const auto tokens = [&](int64_t width, ScalarType type) { return empty(x, {plan.batch, plan.tokens, width}, type); };
  const auto row_numbers = [&] { return empty(x, {rows}, ScalarType::Float); };
  const Tensor mean1 = row_numbers(), rstd1 = row_numbers(), mean2 = row_numbers(), rstd2 = row_numbers();
  const Tensor qkv = tokens(3 * attended, half), merged = tokens(attended, half);
  const Tensor lse = empty(x, {plan.batch, plan.heads, plan.tokens}, ScalarType::Float);
  const Tensor middle = tokens(plan.width, x.scalar_type()), out = tokens(plan.width, x.scalar_type());
  const Tensor h = empty(x, {rows, plan.hidden}, half), a = empty(x, {rows, plan.hidden}, half);

  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  const Matrix mid{middle.data_ptr(), plan.width, input.dtype}, result{out.data_ptr(), plan.width, input.dtype};
  const Matrix normed{out.data_ptr(), plan.width, dtype};  // until fc2 writes over it
  const Matrix activated{a.data_ptr(), plan.hidden, dtype};
  char* const q = static_cast<char*>(qkv.data_ptr());
  const Run run{plan, device.stream(), x.get_device_index()};
  run.layernorm(rows, input, parts.norm1, normed, {floats(mean1), floats(rstd1)});
  run.linear_act(rows, normed, parts.qkv, Activation::kNone, {q, 3 * attended, dtype});
  run.attend(q, q + 2 * attended, static_cast<char*>(merged.data_ptr()), floats(lse), dtype);
  run.linear_residual(rows, {merged.data_ptr(), attended, dtype}, parts.proj, input, mid, factors1.data());
  run.layernorm(rows, mid, parts.norm2, normed, {floats(mean2), floats(rstd2)});
  run.linear_act(rows, normed, parts.fc1, plan.act, activated, {h.data_ptr(), plan.hidden, dtype});
  run.linear_residual(rows, activated, parts.fc2, mid, result, factors2.data());
  return {out, mean1, rstd1, qkv, merged, lse, middle, mean2, rstd2, h};
}

Parts read_parts(const Checks& checks, const BlockPlan& p, const Weights& w) {
  const DType dtype = checks.dtype("qkv_weight", w.qkv_weight.scalar_type());
  return {norm(checks, w.norm1_weight, w.norm1_bias, p.width, p.eps1, dtype),
          linear(checks, w.qkv_weight, w.qkv_bias, {}, 3 * p.attended, p.width, p.packed, dtype),
          linear(checks, w.proj_weight, w.proj_bias, w.layer_scale1, p.width, p.attended, p.proj, dtype),
          norm(checks, w.norm2_weight, w.norm2_bias, p.width, p.eps2, dtype),
          linear(checks, w.fc1_weight, w.fc1_bias, {}, p.hidden, p.width, p.fc1, dtype),
          linear(checks, w.fc2_weight, w.fc2_bias, w.layer_scale2, p.width, p.hidden, p.fc2, dtype)};
}

// The block's result, (B, N, E) or (B, 1, E); nothing where an argument is not as the plan and the kernels want it.
MaybeTensor block(Tensor x, MaybeTensor norm1_weight, MaybeTensor norm1_bias, Tensor qkv_weight, MaybeTensor qkv_bias,
                  Tensor proj_weight, MaybeTensor proj_bias, MaybeTensor layer_scale1, MaybeTensor norm2_weight,
                  MaybeTensor norm2_bias, Tensor fc1_weight, MaybeTensor fc1_bias, Tensor fc2_weight,
                  MaybeTensor fc2_bias, MaybeTensor layer_scale2, Tensor plan) try {
  const Checks checks("block", "x", x);
  const BlockPlan p = read_plan<BlockPlan>(checks, plan);
  return run_block(checks, p, x,
                   read_parts(checks, p,
                              {norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale1,
                               norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale2}));
} catch (const Misfit&) {
  return {};
}

// The same with DropPath's factors (B,), and what a backward reads, see run_block_saving; an empty list for nothing.
std::vector<Tensor> block_saving(Tensor x, MaybeTensor norm1_weight, MaybeTensor norm1_bias, Tensor qkv_weight,
                                 MaybeTensor qkv_bias, Tensor proj_weight, MaybeTensor proj_bias,
                                 MaybeTensor layer_scale1, MaybeTensor norm2_weight, MaybeTensor norm2_bias,
                                 Tensor fc1_weight, MaybeTensor fc1_bias, Tensor fc2_weight, MaybeTensor fc2_bias,
                                 MaybeTensor layer_scale2, MaybeTensor row_scale1, MaybeTensor row_scale2,
                                 Tensor plan) try {
  const Checks checks("block", "x", x);
  const BlockPlan p = read_plan<BlockPlan>(checks, plan);
  return run_block_saving(
      checks, p, x,
      read_parts(checks, p,
                 {norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale1, norm2_weight,
                  norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale2}),
      row_scale1, row_scale2);
} catch (const Misfit&) {
  return {};
}

}  // namespace
}  // namespace fastvit::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(fastvit_cuda, m) {
  m.def("block(Tensor x, " FASTVIT_BLOCK_WEIGHTS ", Tensor plan) -> Tensor?");
  m.def("block_saving(Tensor x, " FASTVIT_BLOCK_WEIGHTS
        ", Tensor? row_scale1, Tensor? row_scale2, Tensor plan) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) {
  m.impl("block", TORCH_BOX(&fastvit::sm90::block));
  m.impl("block_saving", TORCH_BOX(&fastvit::sm90::block_saving));
}
