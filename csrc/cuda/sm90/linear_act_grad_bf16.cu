// The bfloat16 kernel of linear_act_grad.cuh.
#include "cuda/sm90/linear_act_grad.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_act_grad<DType::kBFloat16>(const LinearActGrad&, cudaStream_t);

}  // namespace fastvit::sm90
