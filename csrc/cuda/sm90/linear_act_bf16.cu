// The bfloat16 kernels of linear_act.cuh. A file holds few kernels, so that they compile side by side.
#include "cuda/sm90/linear_act.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_act<DType::kBFloat16, Tile::kLarge>(const LinearAct&, cudaStream_t);
template cudaError_t launch_linear_act<DType::kBFloat16, Tile::kSmall>(const LinearAct&, cudaStream_t);

}  // namespace fastvit::sm90
