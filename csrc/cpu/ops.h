// The ops of fastvit._C. M rows (leading dimensions flattened), E width, F hidden, O output features, B samples.
// Tensors are float32, bfloat16 or float16 on the CPU, in any row stride; meaning: fastvit/reference.py.
#pragma once

#include <array>
#include <string>
#include <tuple>

#include "../common.h"

namespace fastvit::cpu {

template <size_t N>
using Tensors = std::array<Tensor, N>;

// out (..., O) in the dtype of weight; mean, rstd (M,) float32
std::tuple<Tensor, Tensor, Tensor> layernorm_linear_fwd(const Tensor& x,  // (..., E)
                                                        const OptionalTensor& norm_weight,
                                                        const OptionalTensor& norm_bias,  // (E,)
                                                        const Tensor& weight,             // (O, E)
                                                        const OptionalTensor& bias,       // (O,)
                                                        double eps, bool cache);

// (dx, dnorm_weight, dnorm_bias, dweight, dbias); empty where the mask is false
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_linear_bwd(const Tensor& dout,  // (..., O)
                                                                        const Tensor& x, const Tensor& mean,
                                                                        const Tensor& rstd,
                                                                        const OptionalTensor& norm_weight,
                                                                        const OptionalTensor& norm_bias,
                                                                        const Tensor& weight, std::array<bool, 5> mask);

// out (..., O) in the dtype of residual
Tensor linear_residual_fwd(const Tensor& x,                    // (..., E)
                           const Tensor& weight,               // (O, E)
                           const OptionalTensor& bias,         // (O,)
                           const Tensor& residual,             // (..., O)
                           const OptionalTensor& layer_scale,  // (O,)
                           const OptionalTensor& row_scale,    // (B,)
                           bool cache);

// (dx, dweight, dbias, dlayer_scale)
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_residual_bwd(const Tensor& dout,  // (..., O)
                                                               const Tensor& x, const Tensor& weight,
                                                               const OptionalTensor& bias,
                                                               const OptionalTensor& layer_scale,
                                                               const OptionalTensor& row_scale,
                                                               std::array<bool, 4> mask);

// out (B, T + L, E) in the dtype of weight, T prefix tokens first
Tensor patch_embed_fwd(const Tensor& images,                                   // (B, C, IH, IW), uint8 or float
                       const Tensor& weight,                                   // (E, C, PH, PW)
                       const OptionalTensor& bias,                             // (E,)
                       const OptionalTensor& pos_embed,                        // (L, E) or (T + L, E)
                       const OptionalTensor& prefix,                           // (T, E)
                       const OptionalTensor& mean, const OptionalTensor& std,  // (C,)
                       bool cache);

// (dimages, dweight, sum of dout over the samples in float32); empty where the mask is false
std::tuple<Tensor, Tensor, Tensor> patch_embed_bwd(const Tensor& dout,  // (B, T + L, E)
                                                   const Tensor& images, const Tensor& weight, int64_t num_prefix,
                                                   const OptionalTensor& mean, const OptionalTensor& std,
                                                   std::array<bool, 3> mask);

// q, k, v (B, H, N, D) with any strides; attn_mask bool or float, broadcastable to (B, H, Nq, Nk).
// out (B, H, Nq, D) stored as (B, Nq, H, D); statistics (2, B, H, Nq) float32: what a row of scores is shifted by, and
// the reciprocal of its sum of exponentials, 0 where no key is visible
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const OptionalTensor& attn_mask, bool is_causal, double scale);

// Writes dq, dk, dv (B, H, N, D), whose last dimension is contiguous: views of a packed gradient, for example.
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& attn_mask, bool is_causal, const Tensor& out, const Tensor& statistics,
                   double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv);

// The same with q and k normalised and rotated (fastvit/ops/_heads.py), with dropout, and with cu_seqlens (S + 1,) of
// ragged samples: q, k, v are then (1, H, T, D). shifts and inverse_sums, the statistics, (B, H, Nq); dropout_seed (1,)
// int64; weights and biases of norms (D,); rope broadcastable to (B, H, Nk - num_prefix, 2 * D)
std::tuple<Tensor, Tensor, Tensor> attention_general_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const std::string& norm, double q_eps, double k_eps,
    const OptionalTensor& rope, int64_t num_prefix, bool half, const OptionalTensor& attn_mask, bool is_causal,
    double dropout_p, const OptionalTensor& dropout_seed, double scale, const OptionalTensor& cu_seqlens);
// Returns the gradients of q's weight and bias and of k's, float32 (2, D) each; (2, 0) without norms
std::tuple<Tensor, Tensor> attention_general_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& shifts,
    const Tensor& inverse_sums, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const std::string& norm, double q_eps, double k_eps,
    const OptionalTensor& rope, int64_t num_prefix, bool half, const OptionalTensor& attn_mask, bool is_causal,
    double dropout_p, const OptionalTensor& dropout_seed, double scale, const OptionalTensor& cu_seqlens,
    const Tensor& dq, const Tensor& dk, const Tensor& dv);

// out (..., E) in the dtype of x; mean, rstd (M,) float32; h (M, F) before the activation, empty unless save
std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_mlp_fwd(
    const Tensor& x,                                                     // (..., E)
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,  // (E,)
    const Tensor& fc1_weight, const OptionalTensor& fc1_bias,            // (F, E), (F,)
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias,            // (E, F), (E,)
    const OptionalTensor& layer_scale, const OptionalTensor& row_scale,  // (E,), (B,)
    const std::string& act, double eps, bool residual, bool save, bool cache);

// (dx, dnorm_weight, dnorm_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dlayer_scale)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_mlp_bwd(
    const Tensor& dout,  // (..., E)
    const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const Tensor& h,  // (M, F)
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& row_scale, const std::string& act, bool residual, std::array<bool, 8> mask);

// A transformer block without gradients: layernorm_linear, attention, linear_residual and layernorm_mlp in one call.
// out (B, N, E), or (B, 1, E) for the class token alone, in the dtype of x
Tensor block_fwd(const Tensor& x,                                                       // (B, N, E)
                 const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,  // (E,)
                 const Tensor& qkv_weight, const OptionalTensor& qkv_bias,              // (3 H D, E), (3 H D,)
                 const Tensor& proj_weight, const OptionalTensor& proj_bias,            // (E, H D), (E,)
                 const OptionalTensor& layer_scale1,                                    // (E,)
                 const OptionalTensor& norm2_weight, const OptionalTensor& norm2_bias,  // (E,)
                 const Tensor& fc1_weight, const OptionalTensor& fc1_bias,              // (F, E), (F,)
                 const Tensor& fc2_weight, const OptionalTensor& fc2_bias,              // (E, F), (E,)
                 const OptionalTensor& layer_scale2,                                    // (E,)
                 int64_t num_heads, double scale, double eps1, double eps2, const std::string& act, bool cache,
                 bool class_token);

}  // namespace fastvit::cpu
