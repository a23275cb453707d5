#include "ntkcl/core/error.h"
#include "ntkcl/data/views.h"

namespace ntkcl::data {

void fill_views_on_cuda(const kernels::ViewBatch&, at::Device) {
  NTKCL_FAIL(ValueError, "augment_on", "this build of ntkcl has no CUDA kernels; expected ",
             "augment_on = 'threads', or a build where nvcc and a CUDA torch are found ",
             "(ntkcl.build_info says why they were not used)");
}

}  // namespace ntkcl::data
