#include "heads.h"

#include "rows.h"

namespace fastvit::cpu {
namespace {

constexpr const char* OP = "attention";

HeadNorm parse_norm(const std::string& norm) {
  if (norm.empty()) return HeadNorm::none;
  if (norm == "layer") return HeadNorm::layer;
  if (norm == "rms") return HeadNorm::rms;
  TORCH_CHECK_VALUE(false, OP, ": norm is '", norm, "', expected one of '', 'layer', 'rms'");
}

// (1 or B, 1 or H, L, 2 * D)
Tensor checked_table(const HeadOptions& options, const Tensor& q, const Tensor& k) {
  if (!present(options.rope)) return {};
  const int64_t keys = k.size(2), dim = q.size(3), prefix = options.num_prefix;
  TORCH_CHECK_VALUE(dim % 2 == 0, OP, ": q has shape ", shape_text(q.sizes()), ", expected an even head dim with rope");
  TORCH_CHECK_VALUE(prefix >= 0 && prefix <= keys && q.size(2) <= keys, OP, ": num_prefix is ", prefix, " of ",
                    q.size(2), " queries and ", keys, " keys, expected no more than keys, and no more queries");
  TORCH_CHECK_VALUE(options.rope->device().is_cpu(), OP, ": rope is on ", options.rope->device(), ", expected the CPU");
  Tensor table = options.rope->to(at::kFloat);
  while (table.dim() < 4) table = table.unsqueeze(0);
  const auto fits = [&](int64_t i) { return table.size(i) == 1 || table.size(i) == q.size(i); };
  TORCH_CHECK_VALUE(
      table.dim() == 4 && fits(0) && fits(1) && table.size(2) == keys - prefix && table.size(3) == 2 * dim, OP,
      ": rope has shape ", shape_text(options.rope->sizes()), ", expected one broadcastable to ",
      shape_text({q.size(0), q.size(1), keys - prefix, 2 * dim}));
  return table.stride(3) == 1 ? table : table.contiguous();
}

}  // namespace

Preparations preparations(const HeadOptions& options, const Tensor& q, const Tensor& k) {
  const HeadNorm norm = parse_norm(options.norm);
  const Tensor table = checked_table(options, q, k);
  const int64_t dim = q.size(3);
  const auto make = [&](const char* weight_name, const OptionalTensor& weight, const char* bias_name,
                        const OptionalTensor& bias, double eps) {
    check_shape(OP, weight_name, weight, {dim}, "like the head dim of q");
    check_shape(OP, bias_name, bias, {dim}, "like the head dim of q");
    Preparation out{norm, static_cast<float>(eps), {}, {}, table, options.num_prefix, options.half};
    if (norm == HeadNorm::none) return out;
    out.weight = padded_vector(weight, dim, 1.0f);
    out.bias = padded_vector(bias, dim, 0.0f);
    return out;
  };
  return {make("q_weight", options.q_weight, "q_bias", options.q_bias, options.q_eps),
          make("k_weight", options.k_weight, "k_bias", options.k_bias, options.k_eps)};
}

NormGradSums::NormGradSums(bool wanted, int64_t heads, int64_t dim)
    : heads_(heads), dim_(dim), padded_(round_up(dim, PANEL)) {
  if (!wanted) return;
  totals_ = at::zeros({heads, 2, padded_}, at::kDouble);
  values_ = totals_.mutable_data_ptr<double>();
}

Tensor NormGradSums::result() const {
  if (!totals_.defined()) return at::empty({2, 0}, at::kFloat);
  const Tensor sums = at::zeros({2, padded_}, at::kDouble);
  double* total = sums.mutable_data_ptr<double>();
  for (int64_t i = 0; i < heads_; ++i) {
    for (int64_t c = 0; c < 2 * padded_; ++c) total[c] += head(i)[c];
  }
  return sums.narrow(1, 0, dim_).to(at::kFloat);
}

}  // namespace fastvit::cpu
