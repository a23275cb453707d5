#pragma once

#include <optional>

#include "ntkcl/methods/ranpac/options.h"

namespace ntkcl::methods::ranpac {

// RanPAC (McDonnell et al., arXiv 2307.02251): features adapted in the first task alone, a fixed
// random projection h = relu(f W) to many more numbers, and ridge regression on the class labels
// by sums that do not depend on the order of the tasks.
class RanPac : public Method {
 public:
  RanPac(Options options, const nn::VisionTransformer& vit, RandomSource& random);

  bool trains(const TaskInfo& task) const override { return peft_ && task.first(); }
  // Groups "peft" and "head", in the first task.
  void before_task(TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const TaskInfo& task) override;
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  bool repeats(const StepInfo&) const override { return true; }
  std::vector<std::string> stages(const TaskInfo& task) const override;
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override;
  void visit_state(const StateVisitor& visitor) override;

 private:
  at::Tensor projected(const at::Tensor& features) const;  // (B, C) -> (B, M) float64
  // Of the task's features (n, C) and one-hot labels (n, n_new).
  double ridge_of(const at::Tensor& features, const at::Tensor& targets,
                  TaskServices& services) const;
  void check_state() const;

  Options options_;
  const nn::VisionTransformer& vit_;
  at::Tensor projection_;     // (C, M) float64 W: drawn from the seed, no state
  std::optional<Peft> peft_;  // where the first task trains
  SoftmaxHead head_;          // of the first task's classes while they are trained, else empty
  at::Tensor gram_;           // (M, M) float64 G, sum of h h^T; (0, 0) before the first task's end
  at::Tensor class_sums_;     // (M, n_seen) float64 C, sum of h of each class
  at::Tensor weights_;        // (M, n_seen) float64 (G + lambda I)^-1 C
  at::Tensor ridge_;          // (1) float64 on the CPU: lambda of the last task
};

}  // namespace ntkcl::methods::ranpac
