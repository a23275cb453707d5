#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ntkcl/core/error.h"
#include "ntkcl/data/views.h"
#include "ntkcl/kernels/view_batch_cuda.h"

namespace ntkcl::data {

void fill_views_on_cuda(const kernels::ViewBatch& batch, at::Device device) {
  NTKCL_CHECK(batch.images <= kernels::kMostViews, "augment_on", "expected batches of at most ",
              kernels::kMostViews, " images, got ", batch.images);
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(kernels::fill_views_cuda(batch, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace ntkcl::data
