#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/gelu.h"

// For T in float, double, BFloat16. size > 0.
namespace ntkcl::kernels {

template <class T>
cudaError_t gelu_cuda(const Gelu<T>& args, cudaStream_t stream);

template <class T>
cudaError_t gelu_backward_cuda(const GeluBackward<T>& args, cudaStream_t stream);

}  // namespace ntkcl::kernels
