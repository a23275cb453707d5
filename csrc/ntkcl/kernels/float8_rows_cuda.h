#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/float8_rows.h"

// For T in float, BFloat16. rows > 0, width > 0.
namespace ntkcl::kernels {

template <class T>
cudaError_t float8_rows_cuda(const Float8Rows<T>& args, cudaStream_t stream);

}  // namespace ntkcl::kernels
