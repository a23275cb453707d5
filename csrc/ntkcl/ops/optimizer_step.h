#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "ntkcl/kernels/optimizer_step.h"

namespace ntkcl::ops {

// One anchor for each parameter, or none for some; empty: none at all.
using Anchors = c10::List<std::optional<at::Tensor>>;

// The step of an optimiser in one sweep over memory: the pull of a regulariser
// anchor_weight |theta - anchor|^2 (NTK-CL's L_reg, section 5), the update, and a running average
// of the parameters (its EMA). With g the given gradient, for every parameter:
//
//   g <- g + 2 anchor_weight (theta - anchor) + weight_decay theta
//   sgd_step_:   v <- momentum v + g;  theta <- theta - lr v
//   adam_step_:  m <- beta1 m + (1 - beta1) g;  s <- beta2 s + (1 - beta2) g^2
//                theta <- theta - lr m' / (sqrt(s') + eps), with m' = m / (1 - beta1^steps) and
//                s' = s / (1 - beta2^steps); decoupled (AdamW): before,
//                theta <- (1 - lr weight_decay) theta, and nothing is added to g
//   average <- average_decay average + (1 - average_decay) theta
//
//   parameters     float32 or float64, contiguous, all of one type and device; changed
//   gradients      beside parameters: as many, of their shapes, types and devices
//   momenta        beside parameters, contiguous, or empty where momentum is 0; changed
//   means, squares beside parameters, contiguous; changed
//   steps          one float32 on their device: how many steps there have been with this one, at
//                  least 1 (which is not checked on a GPU, where it is not read back)
//   anchors        beside parameters, or empty if anchor_weight is 0
//   averages       beside parameters, contiguous, or empty; changed
//   -> the sum of |theta - anchor|^2 before the step, a scalar of their type
// Without anchors and averages the steps are torch.optim's SGD, Adam and AdamW, up to rounding. No
// gradients are recorded. No two tensors that are changed may overlap. Errors: ValueError (shapes,
// devices, layouts, ranges), TypeError (element types); nothing is changed then.
at::Tensor sgd_step_(at::TensorList parameters, at::TensorList gradients, at::TensorList momenta,
                     const Anchors& anchors, at::TensorList averages, double lr, double momentum,
                     double weight_decay, double anchor_weight, double average_decay);
at::Tensor adam_step_(at::TensorList parameters, at::TensorList gradients, at::TensorList means,
                      at::TensorList squares, const at::Tensor& steps, const Anchors& anchors,
                      at::TensorList averages, double lr, double beta1, double beta2, double eps,
                      double weight_decay, bool decoupled, double anchor_weight,
                      double average_decay);

namespace detail {

// The tensors of a step.
struct StepLists {
  at::TensorList parameters, gradients, first, second;
  const Anchors& anchors;
  at::TensorList averages;
};

void check_sgd_step(const StepLists& lists, const kernels::SgdOptions& options);
void check_adam_step(const StepLists& lists, const at::Tensor& steps,
                     const kernels::AdamOptions& options);

// Not for Meta.
void check_step_apart(const char* op, const StepLists& lists);

// The kernels' arguments, and the copies that some of them point to.
template <class T>
struct StepTensors {
  explicit StepTensors(const StepLists& lists);

  std::vector<at::Tensor> gradients, anchors;  // dense
  std::vector<kernels::StepTensor<T>> tensors;
};

}  // namespace detail
}  // namespace ntkcl::ops
