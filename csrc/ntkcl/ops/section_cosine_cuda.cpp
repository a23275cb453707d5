#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/section_cosine_cuda.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/section_cosine.h"

namespace ntkcl::ops {
namespace {

void normalize_cuda(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& unit,
                    int64_t sections) {
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::NormalizeSections<T> args{
        .x = elements<T>(x),
        .weights = weights.defined() ? elements<T>(weights) : nullptr,
        .unit = mutable_elements<T>(unit),
        .rows = x.size(0),
        .sections = sections,
        .width = x.size(1) / sections};
    C10_CUDA_CHECK(kernels::normalize_sections_cuda(args, c10::cuda::getCurrentCUDAStream()));
  });
}

void project_cuda(const at::Tensor& pulled, const at::Tensor& x, const at::Tensor& weights,
                  const at::Tensor& dx, const at::Tensor& along) {
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::ProjectSections<T> args{.pulled = elements<T>(pulled),
                                           .x = elements<T>(x),
                                           .weights = elements<T>(weights),
                                           .dx = mutable_elements<T>(dx),
                                           .along = mutable_elements<kernels::Compute<T>>(along),
                                           .rows = x.size(0),
                                           .sections = weights.size(0),
                                           .width = x.size(1) / weights.size(0)};
    C10_CUDA_CHECK(kernels::project_sections_cuda(args, c10::cuda::getCurrentCUDAStream()));
  });
}

constexpr detail::SectionKernels kCudaKernels{&normalize_cuda, &project_cuda};

at::Tensor section_cosine_cuda(const at::Tensor& x, const at::Tensor& prototypes,
                               const at::Tensor& weights) {
  const c10::cuda::CUDAGuard guard(x.device());
  return detail::section_cosine(kCudaKernels, x, prototypes, weights);
}

std::tuple<at::Tensor, at::Tensor> section_cosine_backward_cuda(const at::Tensor& grad,
                                                                const at::Tensor& x,
                                                                const at::Tensor& prototypes,
                                                                const at::Tensor& weights) {
  const c10::cuda::CUDAGuard guard(x.device());
  return detail::section_cosine_backward(kCudaKernels, grad, x, prototypes, weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("section_cosine", &section_cosine_cuda);
  m.impl("section_cosine_backward", &section_cosine_backward_cuda);
}

}  // namespace ntkcl::ops
