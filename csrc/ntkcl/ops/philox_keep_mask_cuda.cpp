#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/keep.h"
#include "ntkcl/kernels/philox_keep_mask_cuda.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/philox_keep_mask.h"

namespace ntkcl::ops {
namespace {

at::Tensor philox_keep_mask_cuda(const at::Tensor& key, at::IntArrayRef size, double p) {
  detail::check_philox_keep_mask(key, c10::fromIntArrayRefSlow(size), p);
  const c10::cuda::CUDAGuard guard(key.device());
  at::Tensor mask = at::empty(size, key.options().dtype(at::kByte));
  if (mask.numel() == 0) {
    return mask;
  }
  C10_CUDA_CHECK(kernels::philox_keep_mask_cuda(elements<int64_t>(key), kernels::keep_threshold(p),
                                                mask.numel(), mutable_elements<uint8_t>(mask),
                                                c10::cuda::getCurrentCUDAStream()));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("philox_keep_mask", &philox_keep_mask_cuda);
}

}  // namespace ntkcl::ops
