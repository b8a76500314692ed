// The bfloat16 kernels of linear_residual.cuh.
#include "cuda/sm90/linear_residual.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_residual<DType::kBFloat16, Tile::kLarge, DType::kBFloat16>(const LinearResidual&,
                                                                                              cudaStream_t);
template cudaError_t launch_linear_residual<DType::kBFloat16, Tile::kSmall, DType::kBFloat16>(const LinearResidual&,
                                                                                              cudaStream_t);

}  // namespace fastvit::sm90
