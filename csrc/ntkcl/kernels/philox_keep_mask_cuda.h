#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ntkcl::kernels {

// keep[i] = 1 where element i of n is kept (kernels/keep.h), else 0. The key lies in device
// memory. n > 0.
cudaError_t philox_keep_mask_cuda(const int64_t* device_key, uint32_t threshold, int64_t n,
                                  uint8_t* keep, cudaStream_t stream);

}  // namespace ntkcl::kernels
