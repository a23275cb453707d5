#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/view_batch.h"

namespace ntkcl::kernels {

// All of the batch's pointers are the device's. 0 < images, 0 < size, and a grid's sides hold:
// images <= 65535.
cudaError_t fill_views_cuda(const ViewBatch& batch, cudaStream_t stream);

}  // namespace ntkcl::kernels
