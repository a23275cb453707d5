#include "ntkcl/methods/fine_tune/fine_tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"

namespace ntkcl::methods::fine_tune {

FineTune::FineTune(Options options, const nn::VisionTransformer& vit)
    : options_(std::move(options)),
      peft_(options_.peft, vit),
      head_(options_.head, vit.width(), vit.options()) {}

void FineTune::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  if (task.first()) {
    restart(task.n_new, services);
  } else {
    head_.grow(task.n_old, task.n_new, task.index, services.random());
  }
}

void FineTune::restart(int64_t classes, TaskServices& services) {
  const int64_t task = services.task().index;
  peft_.initialise(task, services.random());
  head_.grow(0, classes, task, services.random());
}

std::vector<optim::ParameterGroup> FineTune::trained(const TaskInfo& task) {
  const bool all = options_.loss == "seen";
  return head_.trained(peft_.parameters(),
                       {all ? 0 : task.n_old, all ? task.n_seen() : task.n_new});
}

Losses FineTune::gradients(const Batch& batch, const StepInfo&, TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  return head_.gradients(batch.whole(peft_.features(batch.images)), batch.labels, services);
}

void FineTune::run_stage(const std::string&, TaskServices&) {
  NTKCL_ASSERT(false);  // there are none
}

Scores FineTune::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return {head_.logits(peft_.features(images))};
}

at::Tensor FineTune::features_of(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return peft_.features(images);
}

void FineTune::visit_state(const StateVisitor& visitor) {
  peft_.visit_state("peft.", visitor);
  head_.visit_state("head.", visitor);
}

Joint::Joint(JointOptions options, const nn::VisionTransformer& vit)
    : FineTune({.peft = std::move(options.peft), .head = std::move(options.head), .loss = "seen"},
               vit) {}

void Joint::before_task(TaskServices& services) {
  restart(services.task().n_seen(), services);
}

}  // namespace ntkcl::methods::fine_tune
