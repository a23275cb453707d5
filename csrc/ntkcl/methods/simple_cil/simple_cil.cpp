#include "ntkcl/methods/simple_cil/simple_cil.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/stats/prototypes.h"

namespace ntkcl::methods {

SimpleCil::SimpleCil(const nn::VisionTransformer& vit)
    : vit_(vit), prototypes_(at::zeros({0, vit.width()}, vit.options())) {}

Losses SimpleCil::gradients(const Batch&, const StepInfo&, TaskServices&) {
  NTKCL_ASSERT(false);  // nothing is trained
  return {};
}

std::vector<std::string> SimpleCil::stages(const TaskInfo&) const {
  return {"prototypes"};
}

void SimpleCil::run_stage(const std::string& stage, TaskServices& services) {
  const TaskInfo& task = services.task();
  stats::ClassMeans means(task.n_old, task.n_new, vit_.width());
  services.for_each_image(stage, [&](const Batch& batch) {
    means.add(batch.whole(features(batch.images)), batch.labels);
  });
  prototypes_ =
      at::cat({prototypes_.narrow(0, 0, task.n_old), means.result(prototypes_.scalar_type())});
}

Scores SimpleCil::scores(const at::Tensor& images) const {
  return {at::linear(nn::unit_rows(features(images)), nn::unit_rows(prototypes_))};
}

void SimpleCil::visit_state(const StateVisitor& visitor) {
  visitor("prototypes", prototypes_);
  NTKCL_CHECK(prototypes_.dim() == 2 && prototypes_.size(1) == vit_.width(), "state",
              "prototypes: expected (classes, ", vit_.width(), "), got ", prototypes_.sizes());
}

at::Tensor SimpleCil::features(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return nn::plain_pass(vit_, vit_.prefix(images));
}

}  // namespace ntkcl::methods
