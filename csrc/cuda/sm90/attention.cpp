// Glue: attention of sm90/attention_*.cu as torch.ops.fastvit_cuda.attention_fwd, attention_packed_fwd, attention_bwd.
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

void check_keys(const Checks& checks, const HeadSizes& p, int64_t most) {
  checks.expect(p.keys >= 1 && p.keys <= most,
                [&] { return "there are " + std::to_string(p.keys) + " keys, expected 1 to " + std::to_string(most); });
}

void check_heads(const Checks& checks, const HeadSizes& p, float scale) {
  checks.expect(scale > 0, [&] { return "scale is " + std::to_string(scale) + ", expected a number > 0"; });
  checks.expect(p.batch * p.heads < int64_t(1) << 31, [&] {
    return "there are " + std::to_string(p.batch * p.heads) + " heads, expected fewer than 2147483648";
  });
}

void check_sizes(const Checks& checks, const AttentionFwd& p) {
  checks.expect(p.dim == kHeadDims[0] || p.dim == kHeadDims[1], [&] {
    return "the head dim is " + std::to_string(p.dim) + ", expected " + std::to_string(kHeadDims[0]) + " or " +
           std::to_string(kHeadDims[1]);
  });
  check_keys(checks, p, kMostKeys);
  checks.expect(p.queries <= most_queries(p.keys), [&] {
    return "there are " + std::to_string(p.queries) + " queries, expected at most " +
           std::to_string(most_queries(p.keys)) + " beside " + std::to_string(p.keys) + " keys";
  });
  check_heads(checks, p, p.scale);
}

void check_sizes(const Checks& checks, const AttentionBwd& p) {
  checks.expect(p.dim == kBwdDim,
                [&] { return "the head dim is " + std::to_string(p.dim) + ", expected " + std::to_string(kBwdDim); });
  check_keys(checks, p, kMostBwdKeys);
  checks.expect(p.queries >= 1 && p.queries <= kMostBwdQueries, [&] {
    return "there are " + std::to_string(p.queries) + " queries, expected 1 to " + std::to_string(kMostBwdQueries);
  });
  check_heads(checks, p, p.scale);
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

// The dtype of q, k and v, which is one
DType check_inputs(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v) {
  const DType dtype = check_dtype(checks, "q", q);
  checks.same_dtype("k", check_dtype(checks, "k", k), "q", dtype);
  checks.same_dtype("v", check_dtype(checks, "v", v), "q", dtype);
  checks.expect(q.dim() == 4 && k.dim() == 4, [&] {
    return "q and k have shapes " + text(q.sizes()) + " and " + text(k.sizes()) + ", expected 4 dimensions";
  });
  return dtype;
}

// (out (B, Nq, H, D), lse (B, H, Nq)) of q (B, H, Nq, D), k and v (B, H, Nk, D)
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, double scale) {
  const Checks checks("attention", "q", q);
  const DType dtype = check_inputs(checks, q, k, v);
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

// Into dq (B, H, Nq, D), dk and dv (B, H, Nk, D), from what attention_fwd was given and gave; out and dout like q.
void attention_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                   double scale) {
  const Checks checks("attention", "q", q);
  const DType dtype = check_inputs(checks, q, k, v);
  AttentionBwd p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.keys = k.size(2), p.dim = q.size(3);
  p.scale = float(scale);
  check_sizes(checks, p);
  const auto rows = [&](const char* name, const Tensor& t, int64_t tokens) {
    checks.same_dtype(name, check_dtype(checks, name, t), "q", dtype);
    return rows_of(checks, name, t, q, tokens);
  };
  p.q = rows("q", q, p.queries), p.k = rows("k", k, p.keys), p.v = rows("v", v, p.keys);
  p.out = rows("out", out, p.queries), p.dout = rows("dout", dout, p.queries);
  p.dq = rows("dq", dq, p.queries), p.dk = rows("dk", dk, p.keys), p.dv = rows("dv", dv, p.keys);
  checks.expect(
      lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.dim() == 3 && lse.size(0) == p.batch &&
          lse.size(1) == p.heads && lse.size(2) == p.queries && lse.get_device() == q.get_device(),
      [&] {
        return "lse has shape " + text(lse.sizes()) + ", expected contiguous float32 (batch, heads, queries) beside q";
      });
  p.lse = static_cast<const float*>(lse.data_ptr());
  const OnDevice device(q);
  p.device = q.get_device_index();
  if (p.batch * p.heads == 0) return;
  check_launch("attention", dtype == DType::kBFloat16 ? launch_attention_bwd<DType::kBFloat16>(p, device.stream())
                                                      : launch_attention_bwd<DType::kFloat16>(p, device.stream()));
}

}  // namespace
}  // namespace fastvit::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(fastvit_cuda, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
  m.def("attention_packed_fwd(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_bwd(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor "
      "out,"
      " Tensor lse, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvit_cuda, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastvit::sm90::attention_fwd));
  m.impl("attention_packed_fwd", TORCH_BOX(&fastvit::sm90::attention_packed_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastvit::sm90::attention_bwd));
}
