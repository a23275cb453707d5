#pragma once

#include <cuda_runtime_api.h>

// How kernels are started, in one place, so that tests can run them on the host instead
// (tests/cpp/cuda_on_host).
namespace ntkcl::kernels {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Arguments&... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace ntkcl::kernels
