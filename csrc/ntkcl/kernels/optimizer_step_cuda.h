#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/optimizer_step.h"

// For T in float, double; count > 0 tensors. The sums of (parameter - anchor)^2 before the step go
// into `distances` (count, blocks), to be added up; any number of blocks > 0 will do.
namespace ntkcl::kernels {

template <class T>
cudaError_t sgd_step_cuda(const StepTensor<T>* tensors, int64_t count, const SgdOptions& options,
                          double* distances, int64_t blocks, cudaStream_t stream);

// steps: on the device, how many there have been with this one.
template <class T>
cudaError_t adam_step_cuda(const StepTensor<T>* tensors, int64_t count, const AdamOptions& options,
                           const float* steps, double* distances, int64_t blocks,
                           cudaStream_t stream);

}  // namespace ntkcl::kernels
