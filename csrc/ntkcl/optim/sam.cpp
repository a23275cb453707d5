// Sharpness-aware minimisation: SAM and RAA's SAM+ (ops/sam_step.h).
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/sam_step.h"
#include "ntkcl/optim/kinds.h"

namespace ntkcl::optim {
namespace {

std::vector<at::Tensor> flat(const std::vector<std::vector<at::Tensor>>& lists) {
  std::vector<at::Tensor> all;
  for (const auto& list : lists) {
    all.insert(all.end(), list.begin(), list.end());
  }
  return all;
}

class Sam : public Optimizer {
 public:
  Sam(const OptimizerOptions& options, std::vector<ParameterGroup> groups)
      : Optimizer(std::move(groups)), options_(options), momentum_(zeros_like_parameters()) {
    NTKCL_CHECK(options_.gamma == "tensor" || options_.gamma == "global", "optimizer",
                "expected gamma 'tensor' or 'global', got '", options_.gamma, "'");
    for (const ParameterGroup& group : this->groups()) {
      parameters_.insert(parameters_.end(), group.parameters.begin(), group.parameters.end());
    }
    saved_ = flat(zeros_like_parameters());
  }

  int passes() const override { return 2; }

  void step(const GradientFn& gradients) override {
    if (parameters_.empty()) {
      gradients(0);
      gradients(1);
      return;
    }
    const std::vector<at::Tensor> first = flat(compute_gradients(gradients, 0));
    ops::sam_ascend_(parameters_, saved_, first, options_.rho);
    descend(first, gradients_up_the_slope(gradients));
  }

  void visit_state(const StateFn& visitor) override { visit_lists("momentum", momentum_, visitor); }

 private:
  // Parameters are back, to the bit, if the gradient function fails.
  std::vector<at::Tensor> gradients_up_the_slope(const GradientFn& gradients) {
    try {
      return flat(compute_gradients(gradients, 1));
    } catch (...) {
      const c10::NoGradGuard no_grad;
      at::_foreach_copy_(parameters_, saved_);
      throw;
    }
  }

  void descend(const std::vector<at::Tensor>& first, const std::vector<at::Tensor>& gradients) {
    std::vector<double> rates, decays;
    std::vector<int64_t> stacked_dims;
    for (size_t g = 0; g < groups().size(); ++g) {
      const size_t count = groups()[g].parameters.size();
      rates.insert(rates.end(), count, learning_rate(g));
      decays.insert(decays.end(), count, decay_of(g, options_.weight_decay));
      stacked_dims.insert(stacked_dims.end(), count, groups()[g].stacked_dims);
    }
    // There is no angle to a step of length 0.
    const bool damps = options_.kind == "sam+" && options_.rho > 0;
    ops::sam_step_(parameters_, flat(momentum_), saved_, first, gradients, rates, decays,
                   stacked_dims, options_.momentum,
                   damps ? std::optional<double>(options_.tau) : std::nullopt,
                   /*together=*/options_.gamma == "global");
  }

  OptimizerOptions options_;
  std::vector<at::Tensor> parameters_;  // of all groups
  std::vector<at::Tensor> saved_;       // what they are before the step up the slope
  TensorLists momentum_;
};

}  // namespace

std::unique_ptr<Optimizer> make_sam(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups) {
  return std::make_unique<Sam>(options, std::move(groups));
}

}  // namespace ntkcl::optim
