#include <c10/core/GradMode.h>

#include "ntkcl/ops/optimizer_step.h"
#include "ntkcl/optim/kinds.h"

namespace ntkcl::optim {
namespace {

class Sgd : public Optimizer {
 public:
  Sgd(const OptimizerOptions& options, std::vector<ParameterGroup> groups)
      : Optimizer(std::move(groups)), options_(options) {
    momentum_.resize(this->groups().size());
    if (options_.momentum != 0) {
      momentum_ = zeros_like_parameters();
    }
  }

  void step(const GradientFn& gradients) override {
    const TensorLists computed = compute_gradients(gradients, 0);
    const c10::NoGradGuard no_grad;
    for (size_t g = 0; g < groups().size(); ++g) {
      const auto& parameters = groups()[g].parameters;
      if (parameters.empty()) {
        continue;
      }
      // Buffers begin at zero, so the first step needs no case of its own.
      ops::sgd_step_(parameters, computed[g], momentum_[g], ops::Anchors(), /*averages=*/{},
                     learning_rate(g), options_.momentum, decay_of(g, options_.weight_decay),
                     /*anchor_weight=*/0, /*average_decay=*/0);
    }
  }

  void visit_state(const StateFn& visitor) override { visit_lists("momentum", momentum_, visitor); }

 private:
  OptimizerOptions options_;
  TensorLists momentum_;
};

}  // namespace

std::unique_ptr<Optimizer> make_sgd(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups) {
  return std::make_unique<Sgd>(options, std::move(groups));
}

}  // namespace ntkcl::optim
