#include "ntkcl/optim/optimizer.h"

#include <ATen/ATen.h>

#include <set>
#include <unordered_set>

#include "ntkcl/core/error.h"
#include "ntkcl/optim/kinds.h"

namespace ntkcl::optim {
namespace {

constexpr const char* kWhere = "optimizer";

std::string parameter_name(const ParameterGroup& group, size_t index) {
  return group.name + "." + std::to_string(index);
}

void check_parameter(const at::Tensor& parameter, const std::string& name) {
  NTKCL_CHECK(parameter.defined(), kWhere, "parameter ", name, " is undefined");
  const auto type = parameter.scalar_type();
  NTKCL_CHECK(type == at::kFloat || type == at::kDouble, kWhere, "parameter ", name,
              ": expected float32 or float64, got ", c10::toString(type));
  NTKCL_CHECK(parameter.is_contiguous(), kWhere, "parameter ", name,
              ": expected a contiguous tensor, got strides ", parameter.strides());
}

void check_groups(const std::vector<ParameterGroup>& groups) {
  std::set<std::string> names;
  std::unordered_set<const c10::TensorImpl*> seen;
  const at::Tensor* first = nullptr;
  for (const ParameterGroup& group : groups) {
    NTKCL_CHECK(names.insert(group.name).second, kWhere, "two groups are named '", group.name, "'");
    for (size_t i = 0; i < group.parameters.size(); ++i) {
      const at::Tensor& parameter = group.parameters[i];
      const std::string name = parameter_name(group, i);
      check_parameter(parameter, name);
      NTKCL_CHECK(0 <= group.stacked_dims && group.stacked_dims <= parameter.dim(), kWhere,
                  "parameter ", name, ": expected stacked_dims from 0 to ", parameter.dim(),
                  ", got ", group.stacked_dims);
      NTKCL_CHECK(seen.insert(parameter.unsafeGetTensorImpl()).second, kWhere, "parameter ", name,
                  " is listed twice");
      first = first ? first : &parameter;
      NTKCL_CHECK(
          parameter.options().type_equal(first->options()) && parameter.device() == first->device(),
          kWhere, "parameter ", name, ": expected ", first->toString(), " on ", first->device(),
          " like the first one, got ", parameter.toString(), " on ", parameter.device());
    }
  }
}

}  // namespace

Optimizer::Optimizer(std::vector<ParameterGroup> groups) : groups_(std::move(groups)) {
  check_groups(groups_);
  rates_.assign(groups_.size(), 0.0);
  for (const ParameterGroup& group : groups_) {
    zero_gradients_.emplace_back(group.parameters.size());
  }
}

void Optimizer::set_learning_rate(double rate) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    set_learning_rate(g, rate * groups_[g].learning_rate_scale);
  }
}

void Optimizer::set_learning_rate(size_t group, double rate) {
  NTKCL_CHECK(rate >= 0, kWhere, "expected a learning rate >= 0, got ", rate);
  rates_.at(group) = rate;
}

Optimizer::TensorLists Optimizer::compute_gradients(const GradientFn& gradients, int pass) {
  for (const ParameterGroup& group : groups_) {
    for (const at::Tensor& parameter : group.parameters) {
      parameter.mutable_grad().reset();
    }
  }
  gradients(pass);
  TensorLists lists(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (size_t i = 0; i < groups_[g].parameters.size(); ++i) {
      lists[g].push_back(gradient_of(g, i));
    }
  }
  return lists;
}

at::Tensor Optimizer::gradient_of(size_t group, size_t index) {
  const at::Tensor& parameter = groups_[group].parameters[index];
  const at::Tensor& gradient = parameter.grad();
  if (!gradient.defined()) {
    at::Tensor& zero = zero_gradients_[group][index];
    if (!zero.defined()) {
      zero = at::zeros_like(parameter, parameter.options().requires_grad(false));
    }
    return zero;
  }
  NTKCL_CHECK(gradient.sizes() == parameter.sizes() &&
                  gradient.options().type_equal(parameter.options()) &&
                  gradient.device() == parameter.device(),
              kWhere, "gradient of parameter ", parameter_name(groups_[group], index),
              ": expected ", parameter.toString(), parameter.sizes(), " on ", parameter.device(),
              ", got ", gradient.toString(), gradient.sizes(), " on ", gradient.device());
  return gradient.detach().contiguous();
}

Optimizer::TensorLists Optimizer::zeros_like_parameters() const {
  TensorLists lists(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (const at::Tensor& parameter : groups_[g].parameters) {
      lists[g].push_back(at::zeros_like(parameter, parameter.options().requires_grad(false)));
    }
  }
  return lists;
}

void Optimizer::visit_lists(const std::string& name, TensorLists& lists,
                            const StateFn& visitor) const {
  for (size_t g = 0; g < lists.size(); ++g) {
    for (size_t i = 0; i < lists[g].size(); ++i) {
      visitor(parameter_name(groups_[g], i) + "." + name, lists[g][i]);
    }
  }
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options,
                                          std::vector<ParameterGroup> groups) {
  if (options.kind == "sgd") {
    return make_sgd(options, std::move(groups));
  }
  if (options.kind == "adam" || options.kind == "adamw") {
    return make_adam(options, std::move(groups));
  }
  if (options.kind == "sam" || options.kind == "sam+") {
    return make_sam(options, std::move(groups));
  }
  NTKCL_FAIL(ValueError, kWhere, "expected 'sgd', 'adam', 'adamw', 'sam' or 'sam+', got '",
             options.kind, "'");
}

}  // namespace ntkcl::optim
