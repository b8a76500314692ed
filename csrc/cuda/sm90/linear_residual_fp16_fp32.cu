// The float16 kernels of linear_residual.cuh beside a float32 residual stream.
#include "cuda/sm90/linear_residual.cuh"

namespace fastvit::sm90 {

template cudaError_t launch_linear_residual<DType::kFloat16, Tile::kLarge, DType::kFloat32>(const LinearResidual&,
                                                                                            cudaStream_t);
template cudaError_t launch_linear_residual<DType::kFloat16, Tile::kSmall, DType::kFloat32>(const LinearResidual&,
                                                                                            cudaStream_t);

}  // namespace fastvit::sm90
