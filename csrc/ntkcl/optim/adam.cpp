#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "ntkcl/ops/optimizer_step.h"
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
      const auto& parameters = groups()[g].parameters;
      if (parameters.empty()) {
        continue;
      }
      // All parameters have taken the same number of steps: one counter serves them all.
      ops::adam_step_(parameters, computed[g], mean_[g], square_[g], steps_, ops::Anchors(),
                      /*averages=*/{}, learning_rate(g), options_.beta1, options_.beta2,
                      options_.eps, decay_of(g, options_.weight_decay), decoupled_,
                      /*anchor_weight=*/0, /*average_decay=*/0);
    }
  }

  void visit_state(const StateFn& visitor) override {
    visit_lists("mean", mean_, visitor);
    visit_lists("square", square_, visitor);
    visitor("steps", steps_);
  }

 private:
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
