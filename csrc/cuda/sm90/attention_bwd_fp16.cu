// The float16 kernels of attention_bwd.cuh.
#include "cuda/sm90/attention_bwd.cuh"

namespace fastvit::sm90 {

template <>
cudaError_t launch_attention_bwd<DType::kFloat16>(const AttentionBwd& p, cudaStream_t stream) {
  return launch_attention_bwd_of<DType::kFloat16>(p, stream);
}

}  // namespace fastvit::sm90
