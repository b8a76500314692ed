// The bfloat16 kernels of attention.cuh.
#include "cuda/sm90/attention.cuh"

namespace fastvit::sm90 {

template <>
cudaError_t launch_attention_fwd<DType::kBFloat16>(const AttentionFwd& p, cudaStream_t stream) {
  return launch_attention_fwd_of<DType::kBFloat16>(p, stream);
}

}  // namespace fastvit::sm90
