// The bfloat16 kernels of linear_act_grad.cuh.
#include "cuda/sm90/linear_act_grad.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_act_grad<DType::kBFloat16, Tile::kLarge>(const LinearActGrad&, cudaStream_t);
template cudaError_t launch_linear_act_grad<DType::kBFloat16, Tile::kSmall>(const LinearActGrad&, cudaStream_t);

}  // namespace fastvit::sm90
