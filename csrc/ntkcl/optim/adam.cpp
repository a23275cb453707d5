#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "ntkcl/optim/kinds.h"

namespace ntkcl::optim {
namespace {

class Adam : public Optimizer {
 public:
  Adam(const OptimizerOptions& options, std::vector<ParameterGroup> groups)
      : Optimizer(std::move(groups)),
        options_(options),
        decoupled_(options.kind == "adamw"),
        mean_(zeros_like_parameters()),
        square_(zeros_like_parameters()) {
    auto where = at::TensorOptions().dtype(at::kFloat);
    for (const ParameterGroup& group : this->groups()) {
      if (!group.parameters.empty()) {
        where = where.device(group.parameters[0].device());
      }
    }
    steps_ = at::zeros({}, where);
  }

  void step(const GradientFn& gradients) override {
    const TensorLists computed = compute_gradients(gradients, 0);
    const c10::NoGradGuard no_grad;
    steps_.add_(1);
    for (size_t g = 0; g < groups().size(); ++g) {
      if (!groups()[g].parameters.empty()) {
        update(g, computed[g]);
      }
    }
  }

  void visit_state(const StateFn& visitor) override {
    visit_lists("mean", mean_, visitor);
    visit_lists("square", square_, visitor);
    visitor("steps", steps_);
  }

 private:
  void update(size_t g, const std::vector<at::Tensor>& gradients) {
    const auto& parameters = groups()[g].parameters;
    const double decay = decay_of(g, options_.weight_decay);
    // All parameters have taken the same number of steps: one counter serves them all.
    const std::vector<at::Tensor> steps(parameters.size(), steps_);
    const auto fused = [&](auto operation) {
      operation(parameters, gradients, mean_[g], square_[g], at::TensorList(), steps,
                learning_rate(g), options_.beta1, options_.beta2, decay, options_.eps);
    };
    if (decoupled_) {
      fused([](const auto&... arguments) {
        at::_fused_adamw_(arguments..., /*amsgrad=*/false, /*maximize=*/false);
      });
    } else {
      fused([](const auto&... arguments) {
        at::_fused_adam_(arguments..., /*amsgrad=*/false, /*maximize=*/false);
      });
    }
  }

  OptimizerOptions options_;
  bool decoupled_;
  TensorLists mean_, square_;
  at::Tensor steps_;  // float32 scalar on the parameters' device
};

}  // namespace

std::unique_ptr<Optimizer> make_adam(const OptimizerOptions& options,
                                     std::vector<ParameterGroup> groups) {
  return std::make_unique<Adam>(options, std::move(groups));
}

}  // namespace ntkcl::optim
