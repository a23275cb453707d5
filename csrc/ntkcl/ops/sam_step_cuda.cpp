#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <numeric>

#include "ntkcl/kernels/sam_step_cuda.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/sam_step.h"
#include "ntkcl/ops/tensor_lists.h"

namespace ntkcl::ops {
namespace {

using detail::SamLists;
using detail::SamOptions;

template <class T>
void ascend(const SamLists& lists, double rho) {
  const detail::SamTensors<T> arguments(lists);
  const auto count = static_cast<int64_t>(lists.parameters.size());
  const int64_t blocks = blocks_of(lists.parameters);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor squares = at::empty(
      {count, blocks}, lists.parameters[0].options().dtype(at::kDouble).requires_grad(false));
  C10_CUDA_CHECK(kernels::sam_square_sums_cuda(arguments.tensors.data(), count,
                                               mutable_elements<double>(squares), blocks, stream));
  const at::Tensor scale = rho / (squares.sum().sqrt() + 1e-16);
  C10_CUDA_CHECK(kernels::sam_ascend_cuda(arguments.tensors.data(), count, elements<double>(scale),
                                          blocks, stream));
}

void sam_ascend_cuda(at::TensorList parameters, at::TensorList saved, at::TensorList gradients,
                     double rho) {
  const SamLists lists{.parameters = parameters, .saved = saved, .first_gradients = gradients};
  detail::check_sam_ascend(lists, rho);
  check_apart("sam_ascend_", {parameters, saved});
  const c10::cuda::CUDAGuard guard(parameters[0].device());
  with_parameter_type(parameters[0], [&](auto element) { ascend<decltype(element)>(lists, rho); });
}

template <class T>
at::Tensor step(const SamLists& lists, const SamOptions& options) {
  const std::vector<int64_t> rows = detail::rows_of(lists.parameters, options.stacked_dims);
  const int64_t all_rows = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  const detail::SamTensors<T> arguments(lists, &options);
  const auto count = static_cast<int64_t>(lists.parameters.size());
  const int64_t blocks = blocks_of(lists.parameters, rows);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto doubles = lists.parameters[0].options().dtype(at::kDouble).requires_grad(false);

  // (row, block, <v, g> and the squares)
  const at::Tensor sums = at::empty({options.tau ? all_rows : 0, blocks, 3}, doubles);
  auto* alignments =
      options.tau ? static_cast<kernels::Alignment*>(sums.mutable_data_ptr()) : nullptr;
  C10_CUDA_CHECK(kernels::sam_momentum_cuda(arguments.tensors.data(), count,
                                            static_cast<T>(options.momentum), alignments, blocks,
                                            stream));
  const at::Tensor gammas =
      (options.tau ? detail::gammas_of(sums.sum(1), *options.tau, options.together)
                   : at::ones({all_rows}, doubles))
          .to(lists.parameters[0].scalar_type());
  C10_CUDA_CHECK(kernels::sam_descend_cuda(arguments.tensors.data(), count, elements<T>(gammas),
                                           blocks, stream));
  return gammas;
}

at::Tensor sam_step_cuda(at::TensorList parameters, at::TensorList momenta, at::TensorList saved,
                         at::TensorList first_gradients, at::TensorList gradients,
                         at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay,
                         at::IntArrayRef stacked_dims, double momentum, std::optional<double> tau,
                         bool together) {
  const SamLists lists{parameters, momenta, saved, first_gradients, gradients};
  const SamOptions options{lr, weight_decay, stacked_dims, momentum, tau, together};
  detail::check_sam_step(lists, options);
  check_apart("sam_step_", {parameters, momenta});
  const c10::cuda::CUDAGuard guard(parameters[0].device());
  return with_parameter_type(parameters[0],
                             [&](auto element) { return step<decltype(element)>(lists, options); });
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("sam_ascend_", &sam_ascend_cuda);
  m.impl("sam_step_", &sam_step_cuda);
}

}  // namespace ntkcl::ops
