#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/optimizer_step_cuda.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/optimizer_step.h"
#include "ntkcl/ops/tensor_lists.h"

namespace ntkcl::ops {
namespace {

using detail::StepLists;

// Calls launch(tensors, count, distances, blocks, stream).
template <class T, class Launch>
at::Tensor sweep(const StepLists& lists, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(lists.parameters[0].device());
  const detail::StepTensors<T> arguments(lists);
  const auto count = static_cast<int64_t>(lists.parameters.size());
  const int64_t blocks = blocks_of(lists.parameters);
  const auto options = lists.parameters[0].options().requires_grad(false);
  const at::Tensor distances = at::empty({count, blocks}, options.dtype(at::kDouble));
  C10_CUDA_CHECK(launch(arguments.tensors.data(), count, mutable_elements<double>(distances),
                        blocks, c10::cuda::getCurrentCUDAStream()));
  return distances.sum().to(options.dtype());
}

at::Tensor sgd_step_cuda(at::TensorList parameters, at::TensorList gradients,
                         at::TensorList momenta, const Anchors& anchors, at::TensorList averages,
                         double lr, double momentum, double weight_decay, double anchor_weight,
                         double average_decay) {
  const StepLists lists{parameters, gradients, momenta, {}, anchors, averages};
  const kernels::SgdOptions options{{lr, weight_decay, anchor_weight, average_decay}, momentum};
  detail::check_sgd_step(lists, options);
  detail::check_step_apart("sgd_step_", lists);
  return with_parameter_type(parameters[0], [&](auto element) {
    return sweep<decltype(element)>(
        lists, [&](const auto* tensors, int64_t count, double* distances, int64_t blocks,
                   cudaStream_t stream) {
          return kernels::sgd_step_cuda(tensors, count, options, distances, blocks, stream);
        });
  });
}

at::Tensor adam_step_cuda(at::TensorList parameters, at::TensorList gradients, at::TensorList means,
                          at::TensorList squares, const at::Tensor& steps, const Anchors& anchors,
                          at::TensorList averages, double lr, double beta1, double beta2,
                          double eps, double weight_decay, bool decoupled, double anchor_weight,
                          double average_decay) {
  const StepLists lists{parameters, gradients, means, squares, anchors, averages};
  const kernels::AdamOptions options{
      {lr, weight_decay, anchor_weight, average_decay}, beta1, beta2, eps, decoupled};
  detail::check_adam_step(lists, steps, options);
  detail::check_step_apart("adam_step_", lists);
  return with_parameter_type(parameters[0], [&](auto element) {
    return sweep<decltype(element)>(
        lists, [&](const auto* tensors, int64_t count, double* distances, int64_t blocks,
                   cudaStream_t stream) {
          return kernels::adam_step_cuda(tensors, count, options, elements<float>(steps), distances,
                                         blocks, stream);
        });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("sgd_step_", &sgd_step_cuda);
  m.impl("adam_step_", &adam_step_cuda);
}

}  // namespace ntkcl::ops
