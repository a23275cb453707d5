#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ntkcl/core/options.h"

// Optimisers of the PEFT parameters: sweeps over all of a group, SAM's over all groups together.
//
// Note: the optimiser asks for the gradients instead of being handed them, because sharpness-aware
// kinds need them twice a step, the second time at perturbed parameters. Everything that belongs
// to a gradient (forward, backward, all-reduce over ranks, clipping) sits inside that function.
namespace ntkcl::optim {

// Parameters that share their settings.
struct ParameterGroup {
  std::string name;  // unique within an optimiser; begins the names of its state
  // Contiguous float32 or float64 tensors, all of one type and on one device.
  std::vector<at::Tensor> parameters;
  double learning_rate_scale = 1.0;
  bool decays = true;  // false: no weight decay
  // Leading dimensions over which each parameter is a stack of tensors that SAM+ tells apart.
  int64_t stacked_dims = 0;
};

struct OptimizerOptions {
  std::string kind = "sgd";
  double momentum = 0.9;
  double weight_decay = 5e-4;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double rho = 0.05;
  double tau = 25;
  std::string gamma = "tensor";

  template <class Visitor>
  void visit(Visitor& v) {
    v("optimizer", kind, one_of({"sgd", "adam", "adamw", "sam", "sam+"}),
      "optimiser of the trained parameters");
    v("momentum", momentum, at_least(0).below(1), "momentum of sgd, sam and sam+");
    v("weight_decay", weight_decay, at_least(0),
      "weight decay: added to the gradient or, with adamw, applied to the parameters");
    v("beta1", beta1, at_least(0).below(1), "decay of Adam's running mean of gradients");
    v("beta2", beta2, at_least(0).below(1), "decay of Adam's running mean of squared gradients");
    v("eps", eps, at_least(0), "added to Adam's denominator");
    v("rho", rho, at_least(0), "length of SAM's perturbation");
    v("tau", tau, above(0), "SAM+: how steeply steps against the ascent direction are damped");
    v("gamma", gamma, one_of({"tensor", "global"}),
      "SAM+: one damping factor per tensor or for all");
  }
};

// Leaves the gradients of pass `pass` (0, 1, ...) in `.grad` of the parameters. They are undefined
// when it is called. One that it leaves undefined counts as zero: the parameter still decays and
// its momentum still moves it.
using GradientFn = std::function<void(int pass)>;
using StateFn = std::function<void(const std::string& name, at::Tensor& value)>;

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // Each group runs at `rate` times its learning_rate_scale, or at a rate of its own.
  void set_learning_rate(double rate);
  void set_learning_rate(size_t group, double rate);
  double learning_rate(size_t group) const { return rates_.at(group); }
  const std::vector<ParameterGroup>& groups() const { return groups_; }

  // How often a step asks for gradients.
  virtual int passes() const { return 1; }
  // One step. ValueError for a gradient that does not fit its parameter.
  virtual void step(const GradientFn& gradients) = 0;

  // All that a resumed run needs: "<group>.<index>.momentum" and the like. The visitor may read a
  // tensor or copy into it; they exist from the start.
  virtual void visit_state(const StateFn& visitor) = 0;

 protected:
  // ValueError for parameters that cannot be trained together.
  explicit Optimizer(std::vector<ParameterGroup> groups);

  using TensorLists = std::vector<std::vector<at::Tensor>>;  // [group][parameter]
  // Gradients of pass `pass`, contiguous, zero where the function left none.
  TensorLists compute_gradients(const GradientFn& gradients, int pass);
  // Zeros in the shape of every parameter.
  TensorLists zeros_like_parameters() const;
  double decay_of(size_t group, double weight_decay) const {
    return groups_[group].decays ? weight_decay : 0.0;
  }
  void visit_lists(const std::string& name, TensorLists& lists, const StateFn& visitor) const;

 private:
  at::Tensor gradient_of(size_t group, size_t index);

  std::vector<ParameterGroup> groups_;
  std::vector<double> rates_;
  TensorLists zero_gradients_;  // made when first needed
};

// The optimiser `options.kind`, learning rate 0 until one is set. SGD, Adam and AdamW are
// torch.optim's, up to rounding. On the CPU no bits depend on the number of threads. SAM and SAM+:
// kinds.h.
std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options,
                                          std::vector<ParameterGroup> groups);

}  // namespace ntkcl::optim
