#include <torch/library.h>

#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/float8_rows.h"

// For builds without CUDA: a CUDA kernel that is not there is an error that says so. Operators that
// are made of torch's own on CUDA (attention) need none.
namespace ntkcl::ops {
namespace detail {

bool cuda_multiplies_float8(at::Device) {
  return false;
}

}  // namespace detail

namespace {

void no_cuda(const c10::OperatorHandle& op, c10::Stack*) {
  NTKCL_OP_CHECK(
      false, op.schema().name().substr(sizeof("ntkcl::") - 1),
      "this build of ntkcl has no CUDA kernels; move the tensors to the CPU, or build where "
      "nvcc and a CUDA torch are found (ntkcl.build_info says why they were not used)");
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  for (const char* op :
       {"adam_step_", "bias_relu_dropout", "bias_relu_dropout_backward", "float8_rows", "gelu",
        "gelu_backward", "philox_keep_mask", "residual_layer_norm", "residual_layer_norm_backward",
        "sam_ascend_", "sam_step_", "section_cosine", "section_cosine_backward", "sgd_step_"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&no_cuda>());
  }
}

}  // namespace ntkcl::ops
