#include "ntkcl/train/step_replay.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace ntkcl::train {
namespace {

// Steps of a pass: the first finds its draws, the second rehearses, the third is recorded.
constexpr int64_t kRehearsals = 2;

// random_ stands for another source while one of these lives.
class Using {
 public:
  Using(methods::RandomSource*& place, methods::RandomSource& source)
      : place_(place), before_(place) {
    place_ = &source;
  }
  ~Using() { place_ = before_; }
  Using(const Using&) = delete;
  Using& operator=(const Using&) = delete;

 private:
  methods::RandomSource*& place_;
  methods::RandomSource* before_;
};

}  // namespace

StepReplay::StepReplay(const methods::Method& method, methods::RandomSource& source,
                       const std::vector<optim::ParameterGroup>& groups, int64_t batch_size,
                       at::Device device, Gradients gradients)
    : method_(method),
      source_(source),
      random_(&source),
      batch_size_(batch_size),
      device_(device),
      gradients_(std::move(gradients)) {
  for (const optim::ParameterGroup& group : groups) {
    parameters_.insert(parameters_.end(), group.parameters.begin(), group.parameters.end());
  }
}

StepReplay::~StepReplay() {
  clear_gradients();
}

methods::Losses StepReplay::gradients(const methods::Batch& batch, const methods::StepInfo& step) {
  if (batch.labels.size(0) != batch_size_ || !method_.repeats(step)) {
    return gradients_(batch, step);
  }
  while (static_cast<int64_t>(passes_.size()) <= step.pass) {
    passes_.push_back(std::make_unique<Pass>(Pass{.draws = StepDraws(source_, device_)}));
  }
  Pass& pass = *passes_[static_cast<size_t>(step.pass)];
  const Using draws(random_, pass.draws);
  pass.draws.begin(step.step);
  if (pass.steps++ == 0) {
    return gradients_(batch, step);
  }
  receive(pass, batch);
  run(pass, step);
  return pass.losses;
}

void StepReplay::receive(Pass& pass, const methods::Batch& batch) const {
  const at::NoGradGuard no_grad;
  if (!pass.graph) {
    pass.graph = make_graph(device_);
    pass.batch = batch;
    pass.batch.images = at::empty_like(batch.images);
    pass.batch.labels = at::empty_like(batch.labels);
  }
  pass.batch.images.copy_(batch.images, /*non_blocking=*/true);
  pass.batch.labels.copy_(batch.labels, /*non_blocking=*/true);
}

void StepReplay::run(Pass& pass, const methods::StepInfo& step) {
  const auto work = [this, &pass, step] {
    pass.losses = gradients_(pass.batch, step);
    pass.gradients.clear();
    for (const at::Tensor& parameter : parameters_) {
      pass.gradients.push_back(parameter.grad());
    }
  };
  if (pass.steps <= kRehearsals) {
    pass.graph->rehearse(work);
    return;
  }
  if (pass.steps == kRehearsals + 1) {
    pass.graph->record(work);
    clear_gradients();
  }
  pass.graph->replay();
  for (size_t i = 0; i < parameters_.size(); ++i) {
    parameters_[i].mutable_grad() = pass.gradients[i];
  }
}

void StepReplay::clear_gradients() const {
  for (const at::Tensor& parameter : parameters_) {
    parameter.mutable_grad().reset();
  }
}

}  // namespace ntkcl::train
