#pragma once

#include "ntkcl/methods/fine_tune/options.h"

namespace ntkcl::methods::fine_tune {

// Sequential fine-tuning, the lower baseline: PEFT modules under a softmax head go on from task to
// task, and nothing holds back forgetting.
class FineTune : public Method {
 public:
  FineTune(Options options, const nn::VisionTransformer& vit);

  // Groups "peft" and "head" (of the classes in the loss).
  void before_task(TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const TaskInfo& task) override;
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  bool repeats(const StepInfo&) const override { return true; }
  std::vector<std::string> stages(const TaskInfo&) const override { return {}; }
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override;
  void visit_state(const StateVisitor& visitor) override;

 protected:
  // Modules and head as they are before anything is learned.
  void restart(int64_t classes, TaskServices& services);

 private:
  Options options_;
  Peft peft_;
  SoftmaxHead head_;
};

// The upper bound: at every task the same trains from the start on the images of all classes seen,
// which it has kept.
class Joint : public FineTune {
 public:
  Joint(JointOptions options, const nn::VisionTransformer& vit);

  ClassRange trains_on(const TaskInfo& task) const override { return {0, task.n_seen()}; }
  void before_task(TaskServices& services) override;
};

}  // namespace ntkcl::methods::fine_tune
