// Glue: attention of sm90/attention_*.cu as torch.ops.fastvit_cuda.attention_fwd and attention_packed_fwd.
// fastvit/ops/attention.py calls them for what they take; what they are given beyond that is an error here.
#include "cuda/sm90/attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/glue.h"

namespace fastvit::sm90 {
namespace {

// `address` is that of the first value; a dimension of one may have any stride.
void check_rows(const Checks& checks, const char* name, const HeadRows& t, int64_t tokens, int64_t heads,
                int64_t batch) {
  const auto suits = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride % 8 == 0); };
  checks.expect(
      reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && suits(tokens, t.token) && suits(heads, t.head) &&
          suits(batch, t.sample),
      [&] { return std::string(name) + " is misaligned, expected rows that start at multiples of 16 bytes"; });
}

DType check_dtype(const Checks& checks, const char* name, const Tensor& t) {
  const DType dtype = checks.dtype(name, t.scalar_type());
  checks.expect(dtype != DType::kFloat32, [&] { return std::string(name) + " is float32, expected 16 bits"; });
  return dtype;
}

void check_sizes(const Checks& checks, const AttentionFwd& p) {
  checks.expect(p.dim == kHeadDims[0] || p.dim == kHeadDims[1], [&] {
    return "the head dim is " + std::to_string(p.dim) + ", expected " + std::to_string(kHeadDims[0]) + " or " +
           std::to_string(kHeadDims[1]);
  });
  checks.expect(p.keys >= 1 && p.keys <= kMostKeys, [&] {
    return "there are " + std::to_string(p.keys) + " keys, expected 1 to " + std::to_string(kMostKeys);
  });
  checks.expect(p.queries <= most_queries(p.keys), [&] {
    return "there are " + std::to_string(p.queries) + " queries, expected at most " +
           std::to_string(most_queries(p.keys)) + " beside " + std::to_string(p.keys) + " keys";
  });
  checks.expect(p.scale > 0, [&] { return "scale is " + std::to_string(p.scale) + ", expected a number > 0"; });
  checks.expect(p.batch * p.heads < int64_t(1) << 31, [&] {
    return "there are " + std::to_string(p.batch * p.heads) + " heads, expected fewer than 2147483648";
  });
}

// Fills in what is computed, and computes it.
std::tuple<Tensor, Tensor> run(AttentionFwd& p, const Tensor& like, DType dtype, std::initializer_list<int64_t> sizes) {
  const OnDevice device(like);
  p.device = like.get_device_index();
  Tensor out = empty(like, sizes, like.scalar_type());
  Tensor lse = empty(like, {p.batch, p.heads, p.queries}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  if (p.batch * p.heads * p.queries > 0) {
    check_launch("attention", dtype == DType::kBFloat16 ? launch_attention_fwd<DType::kBFloat16>(p, device.stream())
                                                        : launch_attention_fwd<DType::kFloat16>(p, device.stream()));
  }
  return {out, lse};
}

HeadRows rows_of(const Checks& checks, const char* name, const Tensor& t, const Tensor& like, int64_t tokens) {
  checks.expect(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == tokens &&
                    t.size(3) == like.size(3),
                [&] {
                  return std::string(name) + " has shape " + text(t.sizes()) +
                         ", expected (batch, heads, tokens, head dim) like q and k";
                });
  checks.expect(t.stride(3) == 1, [&] {
    return std::string(name) + " has strides " + text(t.strides()) + ", expected 1 for the last dimension";
  });
  checks.expect(t.get_device() == like.get_device(),
                [&] { return std::string(name) + " is on another device, expected that of q"; });
  const HeadRows rows{t.data_ptr(), t.stride(2), t.stride(1), t.stride(0)};
  check_rows(checks, name, rows, tokens, like.size(1), like.size(0));
  return rows;
}

// (out (B, Nq, H, D), lse (B, H, Nq)) of q (B, H, Nq, D), k and v (B, H, Nk, D)
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  const Checks checks("attention", "q", q);
  const DType dtype = check_dtype(checks, "q", q);
  checks.same_dtype("k", check_dtype(checks, "k", k), "q", dtype);
  checks.same_dtype("v", check_dtype(checks, "v", v), "q", dtype);
  checks.expect(q.dim() == 4 && k.dim() == 4, [&] {
    return "q and k have shapes " + text(q.sizes()) + " and " + text(k.sizes()) + ", expected 4 dimensions";
  });
  AttentionFwd p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.keys = k.size(2), p.dim = q.size(3);
  p.scale = float(scale);
  check_sizes(checks, p);
  p.q = rows_of(checks, "q", q, q, p.queries);
  p.k = rows_of(checks, "k", k, q, p.keys);
  p.v = rows_of(checks, "v", v, q, p.keys);
  return run(p, q, dtype, {p.batch, p.queries, p.heads, p.dim});
}

// (out (B, N, H * D), lse (B, H, N)) of qkv (B, N, 3 * H * D), read in place
std::tuple<Tensor, Tensor> attention_packed_fwd(Tensor qkv, int64_t heads, double scale) {
  const Checks checks("attention_packed", "qkv", qkv);
  const DType dtype = check_dtype(checks, "qkv", qkv);
  checks.expect(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, [&] {
    return "qkv has shape " + text(qkv.sizes()) + ", expected (batch, tokens, 3 * " + std::to_string(heads) +
           " heads * head dim)";
  });
  checks.expect(qkv.stride(2) == 1,
                [&] { return "qkv has strides " + text(qkv.strides()) + ", expected 1 for the last dimension"; });
  AttentionFwd p{};
  p.batch = qkv.size(0), p.heads = heads, p.queries = p.keys = qkv.size(1);
  p.scale = float(scale);
  const int64_t width = qkv.size(2) / 3;
  p.dim = width / heads;
  check_sizes(checks, p);
  p.q = {qkv.data_ptr(), qkv.stride(1), p.dim, qkv.stride(0)};
  check_rows(checks, "qkv", p.q, p.keys, heads, p.batch);
  p.k = p.v = p.q;
  p.k.data = static_cast<char*>(p.q.data) + 2 * width;
  p.v.data = static_cast<char*>(p.q.data) + 4 * width;
  return run(p, qkv, dtype, {p.batch, p.queries, width});
}

}  // namespace
}  // namespace fastvit::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(fastvit_cuda, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
  m.def("attention_packed_fwd(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastvit::sm90::attention_fwd));
  m.impl("attention_packed_fwd", TORCH_BOX(&fastvit::sm90::attention_packed_fwd));
}
