#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/residual_layer_norm.h"

// For NTKCL_FOR_LAYER_NORM_TYPES. rows * width > 0.
namespace ntkcl::kernels {

template <class S, class U, class O>
cudaError_t residual_layer_norm_cuda(const ResidualLayerNorm<S, U, O>& args, cudaStream_t stream);

template <class S, class U, class O>
cudaError_t residual_layer_norm_backward_cuda(const ResidualLayerNormBackward<S, U, O>& args,
                                              cudaStream_t stream);

}  // namespace ntkcl::kernels
