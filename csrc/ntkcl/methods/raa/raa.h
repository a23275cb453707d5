#pragma once

#include "ntkcl/methods/method.h"
#include "ntkcl/methods/raa/options.h"
#include "ntkcl/nn/adapter_branches.h"
#include "ntkcl/stats/class_gaussians.h"

namespace ntkcl::methods::raa {

// Each row's CosFace loss, (n): CE(S (z - m onehot_y), y) with z the cosines of features (n, C) and
// weight (classes, C) (specification section 3.1).
at::Tensor cosface(const at::Tensor& features, const at::Tensor& weight, const at::Tensor& labels,
                   double scale, double margin);

// (L, n), no share negative and each row of sum 1, for uniform draws u (L, n): u / sum u
// ("uniform_norm"), or -log(1 - u) in their place for a flat Dirichlet ("dirichlet", section 2.2).
at::Tensor shares_of(const at::Tensor& uniform, const std::string& kind);

// The task of each class of tasks of these sizes; as released by the size of the last alone
// ("release", 8.5), else "cumulative".
std::vector<int64_t> tasks_of_classes(const std::vector<int64_t>& sizes, const std::string& kind);

// Random Amalgamation of Adapters (Deng et al., AAAI-26): adapter branches beside a random mixture
// of them, trained with SAM+ and merged after every task; old prototypes move with the features,
// and the cosine head is aligned on class Gaussians.
class Raa : public Method {
 public:
  Raa(Options options, const nn::VisionTransformer& vit, RandomSource& random);

  // Groups "adapters" (branches that train) and "head" (a block of weights for each task).
  void before_task(TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const TaskInfo& task) override;
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  // A left-over gradient has a place in a task's first step.
  bool repeats(const StepInfo& step) const override {
    return !options_.stale_gradient || step.step > 0;
  }
  std::vector<std::string> stages(const TaskInfo& task) const override;
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override { return features(images); }
  void visit_state(const StateVisitor& visitor) override;

  // Class features (B, C) of the merged branch.
  at::Tensor features(const at::Tensor& images) const;

 private:
  // What holds while a task is trained.
  struct Training {
    TaskInfo task;
    int64_t frozen = 0;            // branches, from the first, that do not train
    nn::BranchList branches;       // those that do; parts of branches_
    std::vector<at::Tensor> head;  // of old tasks and this one, parts of head_
  };
  // Of a batch, the same in both passes of a SAM step.
  struct Shared {
    nn::Prefix prefix;
    at::Tensor frozen;                     // (f, b, C), features of the frozen streams
    std::vector<at::Tensor> frozen_added;  // (f, b, T, C) of each block, where they are mixed
  };

  // Class statistics serve the alignment alone.
  bool drifts() const { return options_.alignment.on && options_.drift != "off"; }
  bool mixes() const { return options_.amalgamation != "none"; }
  int64_t pass_of(const StepInfo& step) const { return options_.share_noise ? 0 : step.pass; }
  std::vector<nn::Dropout> dropout(const std::string& purpose, const StepInfo& step,
                                   const dist::Rows& rows, RandomSource& random) const;
  void share(const Batch& batch, const StepInfo& step, RandomSource& random);
  nn::Streams streams(const at::Tensor& alpha) const;
  // Mean of the branches' losses times lambda, and of the mixture's, undefined without one.
  std::pair<at::Tensor, at::Tensor> losses(const at::Tensor& features, const Batch& batch) const;

  void merge();
  void gather_statistics(TaskServices& services);
  // Part of the left-over gradient that concerns block `block` of the head; undefined if none.
  at::Tensor stale_of(size_t block, const StepInfo& step) const;
  // Features before or after training, as drift wants them.
  at::Tensor drift_features(const std::string& when, TaskServices& services) const;
  void align(TaskServices& services);
  std::vector<int64_t> sizes() const;  // of the tasks begun
  void check_state() const;

  Options options_;
  const nn::VisionTransformer& vit_;
  nn::BranchList branches_;
  at::Tensor head_;                  // (n_seen, C)
  at::Tensor task_sizes_;            // (tasks begun) int64 on the CPU
  at::Tensor merged_;                // (1) int64 on the CPU: tasks whose branches are merged
  stats::ClassGaussians gaussians_;  // of classes seen
  at::Tensor before_;                // (n, C), features before training; empty without drift
  at::Tensor stale_;                 // (n_old, C), gradient of the last alignment step, or empty
  Training training_;
  Shared shared_;
};

}  // namespace ntkcl::methods::raa
