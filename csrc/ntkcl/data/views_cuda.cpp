#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ntkcl/data/views.h"
#include "ntkcl/kernels/view_batch_cuda.h"

namespace ntkcl::data {

void fill_views_on_cuda(const kernels::ViewBatch& batch, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(kernels::fill_views_cuda(batch, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace ntkcl::data
