#pragma once

#include "cuda_on_host.h"

// In the place of csrc/ntkcl/kernels/launch.cuh.
namespace ntkcl::kernels {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t,
                   const Arguments&... arguments) {
  cuda_on_host::run(grid, block, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace ntkcl::kernels
