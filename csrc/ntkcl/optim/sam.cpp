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
    ops::sam_ascend_(parameters_, saved_, first_gradients(gradients), options_.rho);
    try {
      descend(flat(compute_gradients(gradients, 1)));
    } catch (...) {  // back, to the bit
      const c10::NoGradGuard no_grad;
      at::_foreach_copy_(parameters_, saved_);
      throw;
    }
    first_.clear();
  }

  void visit_state(const StateFn& visitor) override { visit_lists("momentum", momentum_, visitor); }

 private:
  // Kept where steps are damped by them: the second pass may use their memory again.
  std::vector<at::Tensor> first_gradients(const GradientFn& gradients) {
    std::vector<at::Tensor> first = flat(compute_gradients(gradients, 0));
    first_.clear();
    if (options_.kind == "sam+") {
      for (const at::Tensor& gradient : first) {
        // A step of length 0 has no direction: its cosine is 0.
        first_.push_back(options_.rho > 0 ? gradient.clone() : at::zeros_like(gradient));
      }
    }
    return first;
  }

  void descend(const std::vector<at::Tensor>& gradients) {
    std::vector<double> rates, decays;
    std::vector<int64_t> stacked_dims;
    for (size_t g = 0; g < groups().size(); ++g) {
      const size_t count = groups()[g].parameters.size();
      rates.insert(rates.end(), count, learning_rate(g));
      decays.insert(decays.end(), count, decay_of(g, options_.weight_decay));
      stacked_dims.insert(stacked_dims.end(), count, groups()[g].stacked_dims);
    }
    ops::sam_step_(parameters_, flat(momentum_), saved_, first_, gradients, rates, decays,
                   stacked_dims, options_.momentum,
                   options_.kind == "sam+" ? std::optional<double>(options_.tau) : std::nullopt,
                   /*together=*/options_.gamma == "global");
  }

  OptimizerOptions options_;
  std::vector<at::Tensor> parameters_;  // of all groups
  std::vector<at::Tensor> saved_;       // what they are before the step up the slope
  std::vector<at::Tensor> first_;       // SAM+'s first gradients, within a step
  TensorLists momentum_;
};

}  // namespace

std::unique_ptr<Optimizer> make_sam(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups) {
  return std::make_unique<Sam>(options, std::move(groups));
}

}  // namespace ntkcl::optim
