// The pybind11 module fastvit._C: the CPU ops, what this build is, and what this machine can do.
#include <torch/extension.h>

#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/pack_cache.h"
#ifdef __SANITIZE_THREAD__
#include "sanitize/race.h"
#endif

namespace fastvit {
namespace {

namespace py = pybind11;
using namespace py::literals;

py::dict build_info() {
#ifdef _OPENMP
  constexpr bool openmp = true;  // without it at::parallel_for runs on one thread
#else
  constexpr bool openmp = false;
#endif
  return py::dict("torch"_a = TORCH_VERSION, "compiler"_a = __VERSION__, "openmp"_a = openmp);
}

py::dict cpu_capabilities() {
  return py::dict("fp32"_a = cpu::kernels().isa, "bf16"_a = cpu::bf16_gemm_kind(), "threads"_a = at::get_num_threads());
}

py::dict pack_cache_info(const OptionalTensor& weight) {
  const cpu::PackCacheInfo info = cpu::pack_cache_info(weight);
  return py::dict("entries"_a = info.entries, "bytes"_a = info.bytes);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.doc() = "Compiled CPU operators of fastvit";
  m.def("layernorm_linear_fwd", &cpu::layernorm_linear_fwd, no_gil, "x"_a, "norm_weight"_a, "norm_bias"_a, "weight"_a,
        "bias"_a, "eps"_a, "cache"_a);
  m.def("layernorm_linear_bwd", &cpu::layernorm_linear_bwd, no_gil, "dout"_a, "x"_a, "mean"_a, "rstd"_a,
        "norm_weight"_a, "norm_bias"_a, "weight"_a, "mask"_a);
  m.def("linear_residual_fwd", &cpu::linear_residual_fwd, no_gil, "x"_a, "weight"_a, "bias"_a, "residual"_a,
        "layer_scale"_a, "row_scale"_a, "cache"_a);
  m.def("linear_residual_bwd", &cpu::linear_residual_bwd, no_gil, "dout"_a, "x"_a, "weight"_a, "bias"_a,
        "layer_scale"_a, "row_scale"_a, "mask"_a);
  m.def("patch_embed_fwd", &cpu::patch_embed_fwd, no_gil, "images"_a, "weight"_a, "bias"_a, "pos_embed"_a, "prefix"_a,
        "mean"_a, "std"_a, "cache"_a);
  m.def("patch_embed_bwd", &cpu::patch_embed_bwd, no_gil, "dout"_a, "images"_a, "weight"_a, "num_prefix"_a, "mean"_a,
        "std"_a, "mask"_a);
  m.def("attention_fwd", &cpu::attention_fwd, no_gil, "q"_a, "k"_a, "v"_a, "attn_mask"_a, "is_causal"_a, "scale"_a);
  m.def("attention_bwd", &cpu::attention_bwd, no_gil, "dout"_a, "q"_a, "k"_a, "v"_a, "attn_mask"_a, "is_causal"_a,
        "out"_a, "statistics"_a, "scale"_a, "dq"_a, "dk"_a, "dv"_a);
  m.def("attention_general_fwd", &cpu::attention_general_fwd, no_gil, "q"_a, "k"_a, "v"_a, "q_weight"_a, "q_bias"_a,
        "k_weight"_a, "k_bias"_a, "norm"_a, "q_eps"_a, "k_eps"_a, "rope"_a, "num_prefix"_a, "half"_a, "attn_mask"_a,
        "is_causal"_a, "dropout_p"_a, "dropout_seed"_a, "scale"_a, "cu_seqlens"_a);
  m.def("attention_general_bwd", &cpu::attention_general_bwd, no_gil, "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a,
        "shifts"_a, "inverse_sums"_a, "q_weight"_a, "q_bias"_a, "k_weight"_a, "k_bias"_a, "norm"_a, "q_eps"_a,
        "k_eps"_a, "rope"_a, "num_prefix"_a, "half"_a, "attn_mask"_a, "is_causal"_a, "dropout_p"_a, "dropout_seed"_a,
        "scale"_a, "cu_seqlens"_a, "dq"_a, "dk"_a, "dv"_a);
  m.def("layernorm_mlp_fwd", &cpu::layernorm_mlp_fwd, no_gil, "x"_a, "norm_weight"_a, "norm_bias"_a, "fc1_weight"_a,
        "fc1_bias"_a, "fc2_weight"_a, "fc2_bias"_a, "layer_scale"_a, "row_scale"_a, "act"_a, "eps"_a, "residual"_a,
        "save"_a, "cache"_a);
  m.def("layernorm_mlp_bwd", &cpu::layernorm_mlp_bwd, no_gil, "dout"_a, "x"_a, "mean"_a, "rstd"_a, "h"_a,
        "norm_weight"_a, "norm_bias"_a, "fc1_weight"_a, "fc2_weight"_a, "fc2_bias"_a, "layer_scale"_a, "row_scale"_a,
        "act"_a, "residual"_a, "mask"_a);
  m.def("block_fwd", &cpu::block_fwd, no_gil, "x"_a, "norm1_weight"_a, "norm1_bias"_a, "qkv_weight"_a, "qkv_bias"_a,
        "proj_weight"_a, "proj_bias"_a, "layer_scale1"_a, "norm2_weight"_a, "norm2_bias"_a, "fc1_weight"_a,
        "fc1_bias"_a, "fc2_weight"_a, "fc2_bias"_a, "layer_scale2"_a, "num_heads"_a, "scale"_a, "eps1"_a, "eps2"_a,
        "act"_a, "cache"_a, "class_token"_a);
  m.def("build_info", &build_info);
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("pack_cache_info", &pack_cache_info, "weight"_a = py::none());
  m.def("clear_pack_cache", &cpu::clear_pack_cache);
#ifdef __SANITIZE_THREAD__
  m.def("count_with_a_race", &count_with_a_race, no_gil, "tasks"_a);
#endif
}

}  // namespace fastvit
