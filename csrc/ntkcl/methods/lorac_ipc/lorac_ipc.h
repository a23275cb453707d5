#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "ntkcl/methods/gaussian_alignment.h"
#include "ntkcl/methods/head_alignment.h"
#include "ntkcl/methods/lorac_ipc/importance.h"
#include "ntkcl/methods/lorac_ipc/options.h"
#include "ntkcl/methods/lorac_ipc/orthogonality.h"
#include "ntkcl/methods/lorac_ipc/test_features.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/nn/composed_lora.h"
#include "ntkcl/stats/cluster_gaussians.h"

namespace ntkcl::methods::lorac_ipc {

// LoRAC-IPC (Ling et al., arXiv 2504.13407): a module of LoRA for each task in one composed weight,
// held orthogonal to those before; the matrices that a task has made important freeze; an image is
// classified by the weights as they were after the task that it seems to belong to.
class LoracIpc : public Method {
 public:
  LoracIpc(Options options, const nn::VisionTransformer& vit, int64_t tasks);

  void before_task(TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const TaskInfo& task) override;
  Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) override;
  std::vector<std::string> stages(const TaskInfo& task) const override;
  void run_stage(const std::string& stage, TaskServices& services) override;
  Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override {
    return features(last_task(), images);
  }
  void score(TestImages& images, const ScoresFn& fn) override;
  void visit_state(const StateVisitor& visitor) override;
  void visit_test_state(const StateVisitor& visitor) override;

 private:
  // What holds while a task is trained.
  struct Training {
    TaskInfo task;
    std::vector<Orthogonality> penalties;  // of each group
    std::vector<at::Tensor> unfrozen;      // of each group, (L, g): 0 where frozen, else 1
    at::Tensor head_weight, head_bias;     // of the task's classes, parts of head_
    std::vector<at::Tensor> parameters;    // all that is trained
  };
  struct Snapshot {
    int64_t task = -1;
    std::shared_ptr<const nn::VisionTransformer> vit;
  };

  bool trains_norm() const { return options_.moco_norm == "new"; }
  bool drifts() const { return options_.alignment && options_.drift != "off"; }
  bool aligns_like_raa() const { return options_.alignment_recipe == "raa"; }
  bool aligns_full() const { return aligns_like_raa() || options_.alignment_covariance == "full"; }
  bool infers() const { return options_.inference != "none"; }
  int64_t last_task() const { return task_sizes_.size(0) - 1; }
  int64_t n_seen() const;

  void initialise_head(int64_t classes, RandomSource& random);
  void begin_module(const TaskInfo& task, RandomSource& random);
  void begin_importance();
  at::Tensor current_mask() const;  // mu of section 2, (types, L)
  bool measures(const StepInfo& step) const;
  int64_t importance_window(const StepInfo& step) const;  // last steps of a task
  bool by_entry() const { return options_.importance_of == "entry"; }
  // Leaves whose gradients are the importances, in the parts that products() takes.
  struct Probes {
    bool entries = false;  // with their sign; else one leaf of all matrices
    std::vector<at::Tensor> leaves{};
    nn::ComposedLora::Probes parts{};
  };
  Probes make_probes(bool entries) const;
  void add_importance(const Probes& probes);
  at::Tensor score() const;  // (types, L); undefined where no step was measured
  // Sum of the penalties of what is not frozen; adds lambda times its gradient to A's.
  at::Tensor penalise() const;

  void freeze();
  void gather_statistics(TaskServices& services);
  // Of features (n, C), in which each new class has the rows `rows_of`.
  void add_gaussians(const at::Tensor& rows, const std::vector<at::Tensor>& rows_of,
                     TaskServices& services);
  void add_clusters(const at::Tensor& rows, const std::vector<at::Tensor>& rows_of,
                    TaskServices& services);
  void add_full(const at::Tensor& rows, const std::vector<at::Tensor>& rows_of);
  // Moves the means of old classes, from the task's features after training (n, C).
  void drift(const at::Tensor& after);
  // Clusters (n) of one class's features, from k-means or recorded.
  at::Tensor cluster(const at::Tensor& rows, int64_t clusters, const Draw& draw,
                     RandomSource& random) const;
  void align(TaskServices& services);
  void align_on_draws(const Head& head, TaskServices& services) const;

  // The transformer with its weights as after task `task`. The first and the one asked for last are
  // kept.
  std::shared_ptr<const nn::VisionTransformer> snapshot(int64_t task) const;
  at::Tensor features(int64_t task, const at::Tensor& images) const;
  at::Tensor logits(const at::Tensor& features) const;
  Scores scores_of(const at::Tensor& features, const at::Tensor& tasks) const;
  at::Tensor chosen_tasks();
  // (n) int64 on the CPU: tasks of class numbers; and of the nearest ones as the variant looks them
  // up.
  at::Tensor tasks_of_numbers(const at::Tensor& classes) const;
  at::Tensor tasks_of(const at::Tensor& nearest) const;
  void check_state() const;

  Options options_;
  const nn::VisionTransformer& vit_;
  int64_t tasks_;
  nn::ComposedLora lora_;
  std::vector<at::Tensor> bank_;  // of each group (L, g, t, t): omega [.., i] after task [.., k]
  at::Tensor mask_;               // (types, L) float64 on the CPU: 0 where frozen
  Head head_;                     // of all classes
  Head trained_head_;             // as it was before its last alignment, where that counts
  at::Tensor task_sizes_;         // (finished tasks) int64 on the CPU
  at::Tensor class_ids_;          // (classes) int64 on the CPU: the data set's class of each
  FeatureClusters clusters_;      // for alignment: classes seen, each by features of its task
  stats::ClassGaussians full_;    // the same of full covariance
  at::Tensor before_;             // (n, C), features before training; empty without drift
  stats::ClusterGaussians gaussians_;  // for task inference: classes seen, features of snapshot 0
  // Of the task under way: (types, L), or of each group's entries (L, g, out, in); none without
  // IPC.
  std::vector<ImportanceAverage> importance_;
  Training training_;
  TestFeatures seen_;

  mutable std::mutex snapshots_;
  mutable Snapshot first_, recent_;
};

}  // namespace ntkcl::methods::lorac_ipc
