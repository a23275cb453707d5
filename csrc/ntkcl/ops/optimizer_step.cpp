#include "ntkcl/ops/optimizer_step.h"

#include <torch/library.h>

#include <numeric>

#include "ntkcl/kernels/optimizer_step_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/tensor_lists.h"

namespace ntkcl::ops {
namespace detail {
namespace {

void check_options(const char* op, const kernels::StepOptions& options) {
  check_not_negative(op, "lr", options.lr);
  check_not_negative(op, "weight_decay", options.weight_decay);
  check_not_negative(op, "anchor_weight", options.anchor_weight);
  check_fraction(op, "average_decay", options.average_decay);
}

void check_anchors(const char* op, const Anchors& anchors, at::TensorList parameters) {
  NTKCL_OP_CHECK(anchors.empty() || anchors.size() == parameters.size(), op, "expected ",
                 parameters.size(), " tensors in anchors, one for each parameter, or none, got ",
                 anchors.size());
  for (size_t i = 0; i < anchors.size(); ++i) {
    if (const std::optional<at::Tensor> anchor = anchors[i]) {
      check_item(op, "anchors", i, *anchor, parameters[i]);
    }
  }
}

void check_lists(const char* op, const StepLists& lists, double anchor_weight) {
  check_beside(op, "gradients", lists.gradients, lists.parameters);
  check_anchors(op, lists.anchors, lists.parameters);
  NTKCL_OP_CHECK(anchor_weight == 0 || !lists.anchors.empty(), op,
                 "expected anchors for an anchor_weight of ", anchor_weight, ", got none");
  if (!lists.averages.empty()) {
    check_beside(op, "averages", lists.averages, lists.parameters, /*dense=*/true);
  }
}

}  // namespace

void check_sgd_step(const StepLists& lists, const kernels::SgdOptions& options) {
  const char* op = "sgd_step_";
  check_options(op, options.step);
  check_fraction(op, "momentum", options.momentum);
  check_parameters(op, lists.parameters);
  if (options.momentum != 0 || !lists.first.empty()) {
    check_beside(op, "momenta", lists.first, lists.parameters, /*dense=*/true);
  }
  check_lists(op, lists, options.step.anchor_weight);
}

void check_adam_step(const StepLists& lists, const at::Tensor& steps,
                     const kernels::AdamOptions& options) {
  const char* op = "adam_step_";
  check_options(op, options.step);
  check_fraction(op, "beta1", options.beta1);
  check_fraction(op, "beta2", options.beta2);
  check_not_negative(op, "eps", options.eps);
  check_parameters(op, lists.parameters);
  check_beside(op, "means", lists.first, lists.parameters, /*dense=*/true);
  check_beside(op, "squares", lists.second, lists.parameters, /*dense=*/true);
  check_lists(op, lists, options.step.anchor_weight);
  NTKCL_OP_CHECK_TYPE(steps.scalar_type() == at::kFloat, op, "expected steps of float32, got ",
                      steps.scalar_type());
  NTKCL_OP_CHECK(steps.sym_numel() == 1, op, "expected steps with one element, got shape ",
                 steps.sym_sizes());
  NTKCL_OP_CHECK(steps.device() == lists.parameters[0].device(), op,
                 "expected steps on the parameters' device ", lists.parameters[0].device(),
                 ", got ", steps.device());
}

void check_step_apart(const char* op, const StepLists& lists) {
  check_apart(op, {lists.parameters, lists.first, lists.second, lists.averages});
}

template <class T>
StepTensors<T>::StepTensors(const StepLists& lists) : gradients(contiguous(lists.gradients)) {
  const auto at = [](at::TensorList list, size_t i) {
    return list.empty() ? nullptr : mutable_elements<T>(list[i]);
  };
  for (size_t i = 0; i < lists.parameters.size(); ++i) {
    const std::optional<at::Tensor> anchor =
        lists.anchors.empty() ? std::nullopt : std::optional<at::Tensor>(lists.anchors[i]);
    anchors.push_back(anchor ? anchor->contiguous() : at::Tensor());
    tensors.push_back({.parameter = mutable_elements<T>(lists.parameters[i]),
                       .gradient = elements<T>(gradients[i]),
                       .first = at(lists.first, i),
                       .second = at(lists.second, i),
                       .anchor = anchor ? elements<T>(anchors[i]) : nullptr,
                       .average = at(lists.averages, i),
                       .size = lists.parameters[i].numel()});
  }
}
template struct StepTensors<float>;
template struct StepTensors<double>;

}  // namespace detail

namespace {

using detail::StepLists;

// step: what the kernel takes, in the parameters' type.
template <class T, class Step>
at::Tensor sweep(const StepLists& lists, const Step& step) {
  const detail::StepTensors<T> arguments(lists);
  const std::vector<Part> parts = parts_of(lists.parameters);
  std::vector<double> distances(parts.size());
  for_each_part(parts, [&](const Part& part, size_t i) {
    distances[i] =
        kernels::optimizer_step_cpu(arguments.tensors[part.tensor], step, part.first, part.last);
  });
  return at::full({}, std::accumulate(distances.begin(), distances.end(), 0.0),
                  lists.parameters[0].options().requires_grad(false));
}

at::Tensor sgd_step_cpu(at::TensorList parameters, at::TensorList gradients, at::TensorList momenta,
                        const Anchors& anchors, at::TensorList averages, double lr, double momentum,
                        double weight_decay, double anchor_weight, double average_decay) {
  const StepLists lists{parameters, gradients, momenta, {}, anchors, averages};
  const kernels::SgdOptions options{{lr, weight_decay, anchor_weight, average_decay}, momentum};
  detail::check_sgd_step(lists, options);
  detail::check_step_apart("sgd_step_", lists);
  return with_parameter_type(parameters[0], [&](auto element) {
    using T = decltype(element);
    return sweep<T>(lists, kernels::SgdStep<T>(options));
  });
}

at::Tensor adam_step_cpu(at::TensorList parameters, at::TensorList gradients, at::TensorList means,
                         at::TensorList squares, const at::Tensor& steps, const Anchors& anchors,
                         at::TensorList averages, double lr, double beta1, double beta2, double eps,
                         double weight_decay, bool decoupled, double anchor_weight,
                         double average_decay) {
  const StepLists lists{parameters, gradients, means, squares, anchors, averages};
  const kernels::AdamOptions options{
      {lr, weight_decay, anchor_weight, average_decay}, beta1, beta2, eps, decoupled};
  detail::check_adam_step(lists, steps, options);
  detail::check_step_apart("adam_step_", lists);
  const double count = steps.item<float>();
  NTKCL_OP_CHECK(count >= 1, "adam_step_", "expected steps >= 1, got ", count);
  return with_parameter_type(parameters[0], [&](auto element) {
    using T = decltype(element);
    return sweep<T>(lists, kernels::AdamStep<T>(options, count));
  });
}

at::Tensor distance_meta(at::TensorList parameters) {
  return at::empty({}, parameters[0].options().requires_grad(false));
}

at::Tensor sgd_step_meta(at::TensorList parameters, at::TensorList gradients,
                         at::TensorList momenta, const Anchors& anchors, at::TensorList averages,
                         double lr, double momentum, double weight_decay, double anchor_weight,
                         double average_decay) {
  detail::check_sgd_step({parameters, gradients, momenta, {}, anchors, averages},
                         {{lr, weight_decay, anchor_weight, average_decay}, momentum});
  return distance_meta(parameters);
}

at::Tensor adam_step_meta(at::TensorList parameters, at::TensorList gradients, at::TensorList means,
                          at::TensorList squares, const at::Tensor& steps, const Anchors& anchors,
                          at::TensorList averages, double lr, double beta1, double beta2,
                          double eps, double weight_decay, bool decoupled, double anchor_weight,
                          double average_decay) {
  detail::check_adam_step(
      {parameters, gradients, means, squares, anchors, averages}, steps,
      {{lr, weight_decay, anchor_weight, average_decay}, beta1, beta2, eps, decoupled});
  return distance_meta(parameters);
}

}  // namespace

at::Tensor sgd_step_(at::TensorList parameters, at::TensorList gradients, at::TensorList momenta,
                     const Anchors& anchors, at::TensorList averages, double lr, double momentum,
                     double weight_decay, double anchor_weight, double average_decay) {
  static const auto op = find_operator<decltype(sgd_step_cpu)>("sgd_step_");
  return op.call(parameters, gradients, momenta, anchors, averages, lr, momentum, weight_decay,
                 anchor_weight, average_decay);
}

at::Tensor adam_step_(at::TensorList parameters, at::TensorList gradients, at::TensorList means,
                      at::TensorList squares, const at::Tensor& steps, const Anchors& anchors,
                      at::TensorList averages, double lr, double beta1, double beta2, double eps,
                      double weight_decay, bool decoupled, double anchor_weight,
                      double average_decay) {
  static const auto op = find_operator<decltype(adam_step_cpu)>("adam_step_");
  return op.call(parameters, gradients, means, squares, steps, anchors, averages, lr, beta1, beta2,
                 eps, weight_decay, decoupled, anchor_weight, average_decay);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("sgd_step_", &sgd_step_meta);
  m.impl("adam_step_", &adam_step_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("sgd_step_", &sgd_step_cpu);
  m.impl("adam_step_", &adam_step_cpu);
}

}  // namespace ntkcl::ops
