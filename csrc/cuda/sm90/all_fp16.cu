// The float16 kernels.
#include "cuda/sm90/linear_act.cuh"
#include "cuda/sm90/linear_act_grad.cuh"
#include "cuda/sm90/linear_residual.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_act<DType::kFloat16, Tile::kPingPong>(const LinearAct&, cudaStream_t);
template cudaError_t launch_linear_act<DType::kFloat16, Tile::kSmall>(const LinearAct&, cudaStream_t);
template cudaError_t launch_linear_residual<DType::kFloat16, Tile::kPingPong>(const LinearResidual&, cudaStream_t);
template cudaError_t launch_linear_residual<DType::kFloat16, Tile::kSmall>(const LinearResidual&, cudaStream_t);
template cudaError_t launch_linear_act_grad<DType::kFloat16, Tile::kPingPong>(const LinearActGrad&, cudaStream_t);

}  // namespace fastvit::sm90
