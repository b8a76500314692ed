// The float16 kernels of attention.cuh.
#include "cuda/sm90/attention.cuh"

namespace fastvit::sm90 {

template <>
cudaError_t launch_attention_fwd<DType::kFloat16>(const AttentionFwd& p, cudaStream_t stream) {
  return launch_attention_fwd_of<DType::kFloat16>(p, stream);
}

}  // namespace fastvit::sm90
