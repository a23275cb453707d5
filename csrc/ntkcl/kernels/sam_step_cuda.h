#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/sam_step.h"

// For T in float, double; count > 0 tensors. Sums go into parts, one for each of any number > 0 of
// blocks, to be added up.
namespace ntkcl::kernels {

// The squares of first_gradient: sums (count, blocks).
template <class T>
cudaError_t sam_square_sums_cuda(const SamTensor<T>* tensors, int64_t count, double* sums,
                                 int64_t blocks, cudaStream_t stream);

// saved = parameter; parameter = parameter + *scale * first_gradient. scale: on the device.
template <class T>
cudaError_t sam_ascend_cuda(const SamTensor<T>* tensors, int64_t count, const double* scale,
                            int64_t blocks, cudaStream_t stream);

// momentum = factor * momentum + gradient + decay * saved, and, unless `sums` is null, how each row
// is aligned to the first gradient: sums (all rows, blocks).
template <class T>
cudaError_t sam_momentum_cuda(const SamTensor<T>* tensors, int64_t count, T factor, Alignment* sums,
                              int64_t blocks, cudaStream_t stream);

// parameter = saved - lr * gammas[row] * momentum. gammas: (all rows), on the device.
template <class T>
cudaError_t sam_descend_cuda(const SamTensor<T>* tensors, int64_t count, const T* gammas,
                             int64_t blocks, cudaStream_t stream);

}  // namespace ntkcl::kernels
