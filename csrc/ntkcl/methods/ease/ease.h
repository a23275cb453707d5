#pragma once

#include "ntkcl/methods/ease/options.h"
#include "ntkcl/nn/adapter_branches.h"

namespace ntkcl::methods::ease {

// Prototypes of old classes in the subspace of a new task (the paper's semantic mapping): in the
// subspace of its own task an old class is like the new ones to certain shares, and of the same
// shares it is mixed in the new subspace.
//
//   p_new[i] = sum_j softmax_j( cos(old[i], there[j]) ) fresh[j]
//
// old (o, C), there (n, C): prototypes of old and new classes in the old subspace; fresh (n, C): of
// the new classes in the new one. Returns (o, C).
at::Tensor mapped_prototypes(const at::Tensor& old, const at::Tensor& there,
                             const at::Tensor& fresh);

// Scores (B, n) of features (B, S, C) in S subspaces: the sum over the subspaces of the cosines
// with prototypes (n, S, C), where `own` (n, S) is false weighted by alpha.
at::Tensor ensemble_scores(const at::Tensor& features, const at::Tensor& prototypes,
                           const at::Tensor& own, double alpha);

// EASE (Zhou et al., CVPR 2024): an adapter for each task, which spans a subspace of its own and is
// frozen afterwards; class prototypes in all subspaces.
class Ease : public Method {
 public:
  Ease(Options options, const nn::VisionTransformer& vit);

  // Groups "peft" (the task's adapters) and "head" (of its classes, thrown away).
  void before_task(TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const TaskInfo& task) override;
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  bool repeats(const StepInfo&) const override { return true; }
  std::vector<std::string> stages(const TaskInfo& task) const override;
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override;  // (B, S C)
  void visit_state(const StateVisitor& visitor) override;

 private:
  at::Tensor own_subspaces() const;  // (n_seen, S) bool: of the class's task
  void check_state() const;

  Options options_;
  const nn::VisionTransformer& vit_;
  nn::BranchList adapters_;  // a branch for each task begun
  SoftmaxHead head_;         // of the task's classes while they are trained, else empty
  at::Tensor prototypes_;    // (n_seen, S, C): real in a class's own subspace and those before
  at::Tensor task_sizes_;    // (S) int64 on the CPU: of the tasks finished
  // Of the task that is trained: its branch, and its first class.
  nn::AdapterList current_;
  int64_t first_class_ = 0;
};

}  // namespace ntkcl::methods::ease
