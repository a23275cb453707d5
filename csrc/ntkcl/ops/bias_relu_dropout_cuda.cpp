#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/bias_relu_dropout_cuda.h"
#include "ntkcl/kernels/keep.h"
#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"

namespace ntkcl::ops {
namespace {

at::Tensor bias_relu_dropout_cuda(const at::Tensor& x, const at::Tensor& bias,
                                  const std::optional<at::Tensor>& mask,
                                  const std::optional<at::Tensor>& key, double p) {
  detail::check_bias_relu_dropout(x, bias, mask, key, p);
  NTKCL_OP_CHECK(bias.dim() == 1 || bias.size(0) <= kernels::kMaxGroups, "bias_relu_dropout",
                 "expected at most ", kernels::kMaxGroups, " groups on CUDA, got ", bias.size(0));
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) {
    return y;
  }
  const at::Tensor x_dense = x.contiguous();
  const at::Tensor bias_dense = bias.contiguous();
  const at::Tensor mask_dense = mask ? mask->contiguous() : at::Tensor();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    kernels::BiasReluDropout<T> args{.x = elements<T>(x_dense),
                                     .bias = elements<T>(bias_dense),
                                     .y = mutable_elements<T>(y),
                                     .rows = y.numel() / y.size(-1),
                                     .width = y.size(-1),
                                     .groups = bias.dim() == 2 ? bias.size(0) : 1};
    if (mask) {
      args.dropout = kernels::Dropout::kMask;
      args.scale = 1 / (1 - p);
      args.mask = elements<uint8_t>(mask_dense);
    } else if (key) {
      args.dropout = kernels::Dropout::kKey;
      args.scale = 1 / (1 - p);
      args.threshold = kernels::keep_threshold(p);
      if (key->is_cpu()) {
        args.key = static_cast<uint64_t>(*elements<int64_t>(*key));
      } else {
        args.device_key = elements<int64_t>(*key);
      }
    }
    C10_CUDA_CHECK(kernels::bias_relu_dropout_cuda(args, c10::cuda::getCurrentCUDAStream()));
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> bias_relu_dropout_backward_cuda(const at::Tensor& grad,
                                                                   const at::Tensor& y, double p,
                                                                   int64_t groups) {
  detail::check_bias_relu_dropout_backward(grad, y, p, groups);
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dx = at::empty(y.sizes(), y.options());
  const at::Tensor dbias = groups >= 0 ? at::empty({groups, y.size(-1)}, y.options())
                                       : at::empty({y.size(-1)}, y.options());
  if (y.numel() == 0) {
    return {dx, dbias.zero_()};
  }
  const at::Tensor grad_dense = grad.contiguous();
  const at::Tensor y_dense = y.contiguous();
  with_element_type(y.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::BiasReluDropoutBackward<T> args{.grad = elements<T>(grad_dense),
                                                   .y = elements<T>(y_dense),
                                                   .dx = mutable_elements<T>(dx),
                                                   .dbias = mutable_elements<T>(dbias),
                                                   .rows = y.numel() / y.size(-1),
                                                   .width = y.size(-1),
                                                   .groups = std::max<int64_t>(groups, 1),
                                                   .scale = 1 / (1 - p)};
    const int64_t chunks =
        kernels::bias_relu_dropout_chunks_cuda(args.rows / args.groups, args.width);
    const at::Tensor workspace = at::empty({args.groups, chunks, args.width},
                                           y.options().dtype(compute_type(y.scalar_type())));
    C10_CUDA_CHECK(kernels::bias_relu_dropout_backward_cuda(
        args, mutable_elements<kernels::Compute<T>>(workspace), c10::cuda::getCurrentCUDAStream()));
  });
  return {dx, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("bias_relu_dropout", &bias_relu_dropout_cuda);
  m.impl("bias_relu_dropout_backward", &bias_relu_dropout_backward_cuda);
}

}  // namespace ntkcl::ops
