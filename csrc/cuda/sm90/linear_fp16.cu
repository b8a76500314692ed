// The float16 kernels of linear_act.cuh and linear_residual.cuh.
#include "cuda/sm90/linear_act.cuh"
#include "cuda/sm90/linear_residual.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_act<DType::kFloat16, Tile::kPingPong>(const LinearAct&, cudaStream_t);
template cudaError_t launch_linear_act<DType::kFloat16, Tile::kSmall>(const LinearAct&, cudaStream_t);
template cudaError_t launch_linear_residual<DType::kFloat16, Tile::kPingPong>(const LinearResidual&, cudaStream_t);
template cudaError_t launch_linear_residual<DType::kFloat16, Tile::kSmall>(const LinearResidual&, cudaStream_t);

}  // namespace fastvit::sm90
