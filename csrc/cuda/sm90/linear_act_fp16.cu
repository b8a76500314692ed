// The float16 kernels of linear_act.cuh.
#include "cuda/sm90/linear_act.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_act<DType::kFloat16, Tile::kLarge>(const LinearAct&, cudaStream_t);
template cudaError_t launch_linear_act<DType::kFloat16, Tile::kSmall>(const LinearAct&, cudaStream_t);

}  // namespace fastvit::sm90
