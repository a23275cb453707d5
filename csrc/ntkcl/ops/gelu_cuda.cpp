#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/gelu_cuda.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/gelu.h"

namespace ntkcl::ops {
namespace {

at::Tensor gelu_cuda(const at::Tensor& x) {
  detail::check_gelu(x);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) {
    return y;
  }
  const at::Tensor x_dense = x.contiguous();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::Gelu<T> args{
        .x = elements<T>(x_dense), .y = mutable_elements<T>(y), .size = y.numel()};
    C10_CUDA_CHECK(kernels::gelu_cuda(args, c10::cuda::getCurrentCUDAStream()));
  });
  return y;
}

at::Tensor gelu_backward_cuda(const at::Tensor& grad, const at::Tensor& x) {
  detail::check_gelu_backward(grad, x);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor dx = at::empty(x.sizes(), x.options());
  if (dx.numel() == 0) {
    return dx;
  }
  const at::Tensor grad_dense = grad.contiguous(), x_dense = x.contiguous();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::GeluBackward<T> args{.grad = elements<T>(grad_dense),
                                        .x = elements<T>(x_dense),
                                        .dx = mutable_elements<T>(dx),
                                        .size = dx.numel()};
    C10_CUDA_CHECK(kernels::gelu_backward_cuda(args, c10::cuda::getCurrentCUDAStream()));
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("gelu", &gelu_cuda);
  m.impl("gelu_backward", &gelu_backward_cuda);
}

}  // namespace ntkcl::ops
