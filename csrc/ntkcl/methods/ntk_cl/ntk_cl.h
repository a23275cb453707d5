#pragma once

#include "ntkcl/methods/method.h"
#include "ntkcl/methods/ntk_cl/options.h"
#include "ntkcl/nn/fusion.h"
#include "ntkcl/nn/prompts.h"
#include "ntkcl/stats/class_gaussians.h"

namespace ntkcl::methods::ntk_cl {

// One channel list and one patch list: the trained one, or a frozen running mean of it.
struct Lists {
  nn::AdapterList channel;
  nn::PromptList patch;

  std::vector<at::Tensor> tensors() const;
};

// Class features (B, D) of the two sub-networks and of their fusion; undefined where the mode
// leaves one out. D = sections * C, ordered [plain?, oldest frozen .. newest frozen, current].
struct Features {
  at::Tensor channel, patch, fused;
};

// Which frozen list the EMA after task t updates, 1 = newest .. K = oldest (section 2).
int64_t list_in_use(int64_t frozen_lists, int64_t task, int64_t tasks);

// NTK-CL: Liu et al., "Parameter-Efficient Fine-Tuning for Continual Learning: A Neural Tangent
// Kernel Perspective", arXiv 2407.17120. Two PEFT sub-networks, a channel adapter and generated
// prompts, each as K frozen lists beside the trained one; their features are fused.
class NtkCl : public Method {
 public:
  // ValueError if `tasks` < K: some frozen list would never be written.
  NtkCl(Options options, const nn::VisionTransformer& vit, int64_t tasks, RandomSource& random);

  bool trains(const TaskInfo& task) const override {
    return task.first() || !options_.first_task_only;
  }
  // Groups "peft" (channel list, patch list, fusion, head weight) and "head.sigma".
  void before_task(TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const TaskInfo& task) override;
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  bool repeats(const StepInfo&) const override { return true; }
  std::vector<std::string> stages(const TaskInfo& task) const override;
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override {
    return scored(features(images));
  }
  void visit_state(const StateVisitor& visitor) override;

  // Without dropout and without a graph.
  Features features(const at::Tensor& images) const { return features(Batch{images, {}}); }
  Features features(const Batch& batch) const;

 private:
  // What is constant while one task trains.
  struct TaskConstants {
    TaskInfo info;
    std::vector<std::pair<std::string, at::Tensor>> previous;  // weights under L_reg at its start
    at::Tensor orth;                                           // direction w (D), or basis U (C, k)
  };
  // Dropout of one training step; null in evaluation.
  struct Noise {
    RandomSource& random;
    int64_t task, step;
    const dist::Rows& rows;
  };

  bool uses_channel() const { return options_.mode != "patch"; }
  bool uses_patch() const { return options_.mode != "channel"; }
  bool fuses() const { return options_.mode == "both"; }
  int64_t sections() const;

  void initialise(Lists& lists, int64_t number, RandomSource& random);
  Features forward(const Batch& batch, const Noise* noise) const;
  at::Tensor channel_features(const nn::Prefix& prefix, const at::Tensor& plain,
                              const Noise* noise) const;
  at::Tensor patch_features(const nn::Prefix& prefix, const at::Tensor& plain) const;
  std::vector<nn::Dropout> adapter_dropout(const Noise* noise, int64_t list) const;
  // The feature that is scored: F_m, or that of the single mode.
  const at::Tensor& scored(const Features& features) const;

  std::vector<at::Tensor> peft_parameters() const;
  std::vector<std::pair<std::string, at::Tensor>> regularised() const;
  std::vector<std::pair<std::string, at::Tensor>> copied_weights() const;
  at::Tensor orth_constant() const;
  at::Tensor all_features(const std::string& activity, TaskServices& services) const;

  at::Tensor cross_entropy(const at::Tensor& features, const at::Tensor& labels) const;
  at::Tensor dissimilarity_loss(const Features& features, const Batch& batch, const StepInfo& step,
                                RandomSource& random) const;
  at::Tensor orthogonality_loss(const Features& features) const;
  // Value of L_reg (unweighted); adds lambda times its gradient to .grad.
  at::Tensor regularise() const;

  void check_state() const;
  void update_frozen_list(const TaskInfo& task);
  void update_prototypes(TaskServices& services);
  // Shift of the old prototypes, from features after training; undefined without drift.
  at::Tensor drift(const at::Tensor& after) const;
  // RAA's alignment (gaussian_alignment.h) of the class weights, which begin as the prototypes.
  void align(TaskServices& services);
  // What images are compared with: (n_seen, D).
  const at::Tensor& class_weights() const { return options_.alignment.on ? aligned_ : prototypes_; }

  Options options_;
  const nn::VisionTransformer& vit_;
  Lists current_;
  std::vector<Lists> frozen_;  // index 0 = newest (1) .. K-1 = oldest (K)
  at::Tensor tasks_in_list_;   // int64 (K): tasks averaged into each frozen list
  std::optional<nn::Fusion> fusion_;
  at::Tensor head_weight_, head_sigma_;  // (c_t, D), (1)
  at::Tensor prototypes_;                // (n_seen, D)
  at::Tensor multipliers_;               // (sections)
  at::Tensor before_;                    // (n, D), features before training; empty without drift
  at::Tensor aligned_;                   // (n_seen, D) with alignment, else (0, D)
  std::optional<stats::ClassGaussians> gaussians_;  // with alignment
  TaskConstants constants_;
};

}  // namespace ntkcl::methods::ntk_cl
