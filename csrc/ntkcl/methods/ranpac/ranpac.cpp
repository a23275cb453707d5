#include "ntkcl/methods/ranpac/ranpac.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "ntkcl/core/error.h"
#include "ntkcl/methods/gathering.h"
#include "ntkcl/methods/ranpac/ridge.h"

namespace ntkcl::methods::ranpac {
namespace {

constexpr double kFitted = 0.8;  // share of a task's features that a candidate is fitted on
constexpr int64_t kRows = 1024;  // projected at a time for the sums: they are 8 M bytes each

}  // namespace

RanPac::RanPac(Options options, const nn::VisionTransformer& vit, RandomSource& random)
    : options_(std::move(options)), vit_(vit), head_(options_.head, vit.width(), vit.options()) {
  const at::TensorOptions like = vit.options().dtype(at::kDouble);
  const int64_t m = options_.projection;
  projection_ = random.normal({"projection"}, {vit.width(), m}, like);
  if (options_.first_session) {
    peft_.emplace(options_.peft, vit);
  }
  gram_ = at::zeros({0, 0}, like);
  class_sums_ = at::zeros({m, 0}, like);
  weights_ = at::zeros({m, 0}, like);
  ridge_ = at::zeros({1}, at::kDouble);
}

// ---- Training ----

void RanPac::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  NTKCL_CHECK(class_sums_.size(1) == task.n_old, "state", "class_sums: expected the ", task.n_old,
              " classes learned before, got ", class_sums_.size(1));
  if (trains(task)) {
    peft_->initialise(task.index, services.random());
    head_.grow(0, task.n_new, task.index, services.random());
  }
}

std::vector<optim::ParameterGroup> RanPac::trained(const TaskInfo& task) {
  if (!trains(task)) {
    return {};
  }
  return head_.trained(peft_->parameters(), {0, task.n_new});
}

Losses RanPac::gradients(const Batch& batch, const StepInfo&, TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  return head_.gradients(batch.whole(peft_->features(batch.images)), batch.labels, services);
}

// ---- After training ----

std::vector<std::string> RanPac::stages(const TaskInfo&) const {
  return {"statistics"};
}

void RanPac::run_stage(const std::string& stage, TaskServices& services) {
  const at::NoGradGuard no_grad;
  const TaskInfo& task = services.task();
  head_ = SoftmaxHead(options_.head, vit_.width(), vit_.options());
  std::vector<at::Tensor> parts, labels_of;
  services.for_each_image(stage, [&](const Batch& batch) {
    parts.push_back(batch.whole(features_of(batch.images)));
    labels_of.push_back(batch.labels);
  });
  const at::Tensor features = gathered(parts, task), labels = at::cat(labels_of);
  rows_of_classes(labels, task);  // refuses a class without images
  const at::Tensor targets = at::one_hot(labels - task.n_old, task.n_new).to(at::kDouble);
  const double ridge = options_.ridge > 0 ? options_.ridge : ridge_of(features, targets, services);
  const int64_t m = options_.projection;
  if (gram_.numel() == 0) {
    gram_ = at::zeros({m, m}, gram_.options());
  }
  at::Tensor sums = at::zeros({m, task.n_new}, gram_.options());
  for (int64_t first = 0; first < features.size(0); first += kRows) {
    const int64_t count = std::min(kRows, features.size(0) - first);
    const at::Tensor rows = projected(features.narrow(0, first, count));
    gram_.addmm_(rows.t(), rows);
    sums.addmm_(rows.t(), targets.narrow(0, first, count));
  }
  class_sums_ = at::cat({class_sums_, sums}, 1);
  const RidgeSolution solution = solve_ridge(gram_, class_sums_, ridge);
  weights_ = solution.weights;
  ridge_.fill_(solution.ridge);
}

// Of the task's own features and classes, as published: old ones would have zero targets.
double RanPac::ridge_of(const at::Tensor& features, const at::Tensor& targets,
                        TaskServices& services) const {
  const int64_t n = features.size(0),
                fitted = static_cast<int64_t>(kFitted * static_cast<double>(n));
  NTKCL_CHECK(fitted > 0, "ranpac", "'ridge': expected at least two training images in task ",
              services.task().index, " to choose it, got ", n, "; give a number for it");
  const at::Tensor order = services.random()
                               .permutation({"ridge.split", services.task().index}, n)
                               .to(features.device());
  const at::Tensor in = order.narrow(0, 0, fitted), out = order.narrow(0, fitted, n - fitted);
  return best_ridge(projected(features.index_select(0, in)), targets.index_select(0, in),
                    projected(features.index_select(0, out)), targets.index_select(0, out));
}

// ---- Inference ----

at::Tensor RanPac::projected(const at::Tensor& features) const {
  return at::relu(features.to(at::kDouble).matmul(projection_));
}

Scores RanPac::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const at::Tensor features = features_of(images);
  return {projected(features).matmul(weights_).to(features.scalar_type())};
}

at::Tensor RanPac::features_of(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return peft_ ? peft_->features(images) : nn::plain_pass(vit_, vit_.prefix(images));
}

// ---- State ----

void RanPac::visit_state(const StateVisitor& visitor) {
  if (peft_) {
    peft_->visit_state("peft.", visitor);
    head_.visit_state("head.", visitor);
  }
  visitor("gram", gram_);
  visitor("class_sums", class_sums_);
  visitor("weights", weights_);
  visitor("ridge", ridge_);
  check_state();
}

// Tensors that came from outside fit each other.
void RanPac::check_state() const {
  const int64_t m = options_.projection;
  NTKCL_CHECK(class_sums_.dim() == 2 && class_sums_.size(0) == m, "state", "class_sums: expected (",
              m, ", classes), got ", class_sums_.sizes());
  NTKCL_CHECK(weights_.sizes() == class_sums_.sizes(), "state", "weights: expected ",
              class_sums_.sizes(), ", got ", weights_.sizes());
  const int64_t rows = class_sums_.size(1) > 0 ? m : 0;
  NTKCL_CHECK(gram_.sizes() == at::IntArrayRef({rows, rows}), "state", "gram: expected [", rows,
              ", ", rows, "], got ", gram_.sizes());
  NTKCL_CHECK(ridge_.sizes() == at::IntArrayRef({1}), "state", "ridge: expected [1], got ",
              ridge_.sizes());
}

}  // namespace ntkcl::methods::ranpac
