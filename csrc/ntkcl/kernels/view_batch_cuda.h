#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/view_batch.h"

namespace ntkcl::kernels {

inline constexpr int64_t kMostViews = 65535;  // a grid's second side

// All of the batch's pointers are the device's. 0 < images <= kMostViews, 0 < size.
cudaError_t fill_views_cuda(const ViewBatch& batch, cudaStream_t stream);

}  // namespace ntkcl::kernels
