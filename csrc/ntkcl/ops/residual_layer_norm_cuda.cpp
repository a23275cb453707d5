#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/residual_layer_norm_cuda.h"
#include "ntkcl/ops/residual_layer_norm_arguments.h"

namespace ntkcl::ops {
namespace {

void forward_cuda(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                  const at::Tensor& bias, double eps, const ResidualLayerNorm& results) {
  detail::with_forward_arguments(x, update, weight, bias, eps, results, [](const auto& args) {
    C10_CUDA_CHECK(kernels::residual_layer_norm_cuda(args, c10::cuda::getCurrentCUDAStream()));
  });
}

void backward_cuda(const at::Tensor& grad, const at::Tensor& sum_grad, const at::Tensor& sum,
                   const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight,
                   const at::Tensor& dx, const at::Tensor& dupdate) {
  detail::with_backward_arguments(
      grad, sum_grad, sum, mean, scale, weight, dx, dupdate, [](const auto& args) {
        C10_CUDA_CHECK(
            kernels::residual_layer_norm_backward_cuda(args, c10::cuda::getCurrentCUDAStream()));
      });
}

constexpr detail::ResidualLayerNormKernels kCudaKernels{&forward_cuda, &backward_cuda};

detail::FourTensors residual_layer_norm_cuda(const at::Tensor& x,
                                             const std::optional<at::Tensor>& update,
                                             const at::Tensor& weight, const at::Tensor& bias,
                                             double eps, std::optional<at::ScalarType> dtype) {
  const c10::cuda::CUDAGuard guard(x.device());
  return detail::residual_layer_norm(kCudaKernels, x, update, weight, bias, eps, dtype);
}

detail::FourTensors residual_layer_norm_backward_cuda(
    const at::Tensor& grad, const std::optional<at::Tensor>& sum_grad, const at::Tensor& sum,
    const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight,
    std::optional<at::ScalarType> update_dtype, bool affine) {
  const c10::cuda::CUDAGuard guard(sum.device());
  return detail::residual_layer_norm_backward(kCudaKernels, grad, sum_grad, sum, mean, scale,
                                              weight, update_dtype, affine);
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("residual_layer_norm", &residual_layer_norm_cuda);
  m.impl("residual_layer_norm_backward", &residual_layer_norm_backward_cuda);
}

}  // namespace ntkcl::ops
