#pragma once

#include "ntkcl/methods/method.h"
#include "ntkcl/nn/vision_transformer.h"

namespace ntkcl::methods {

// SimpleCIL (Zhou et al., arXiv 2303.07338): class means of the frozen backbone's features, scored
// by cosine. No training; the baseline that every PEFT method must beat.
class SimpleCil : public Method {
 public:
  explicit SimpleCil(const nn::VisionTransformer& vit);

  bool trains(const TaskInfo&) const override { return false; }
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  std::vector<std::string> stages(const TaskInfo& task) const override;
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override { return features(images); }
  void visit_state(const StateVisitor& visitor) override;

 private:
  at::Tensor features(const at::Tensor& images) const;

  const nn::VisionTransformer& vit_;
  at::Tensor prototypes_;  // (n_seen, C)
};

}  // namespace ntkcl::methods
