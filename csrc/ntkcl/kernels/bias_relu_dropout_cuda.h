#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/bias_relu_dropout.h"
#include "ntkcl/kernels/element.h"

// For T in float, double, BFloat16. rows * width > 0, groups <= kMaxGroups.
namespace ntkcl::kernels {

inline constexpr int64_t kMaxGroups = 65535;  // a grid's third side

template <class T>
cudaError_t bias_relu_dropout_cuda(const BiasReluDropout<T>& args, cudaStream_t stream);

// The backward pass sums dx's columns in two steps, without atomics, so that equal inputs give
// equal bits. workspace: (groups, bias_relu_dropout_chunks_cuda(rows / groups, width), width).
int64_t bias_relu_dropout_chunks_cuda(int64_t group_rows, int64_t width);

template <class T>
cudaError_t bias_relu_dropout_backward_cuda(const BiasReluDropoutBackward<T>& args,
                                            Compute<T>* workspace, cudaStream_t stream);

}  // namespace ntkcl::kernels
