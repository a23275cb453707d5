#include "ntkcl/methods/ease/ease.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"
#include "ntkcl/methods/peft.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/stats/prototypes.h"

namespace ntkcl::methods::ease {

at::Tensor mapped_prototypes(const at::Tensor& old, const at::Tensor& there,
                             const at::Tensor& fresh) {
  return nn::cosines(old, there).softmax(1).matmul(fresh);
}

at::Tensor ensemble_scores(const at::Tensor& features, const at::Tensor& prototypes,
                           const at::Tensor& own, double alpha) {
  const at::Tensor weights =
      at::where(own, prototypes.new_ones({}), prototypes.new_full({}, alpha));
  const at::Tensor weighted = nn::unit_rows(prototypes) * weights.unsqueeze(2);
  return at::linear(nn::unit_rows(features).flatten(1), weighted.flatten(1));
}

Ease::Ease(Options options, const nn::VisionTransformer& vit)
    : options_(std::move(options)),
      vit_(vit),
      adapters_(nn::BranchList::zeros(0, vit.depth(), options_.rank, vit.width(), vit.options())),
      head_(options_.head, vit.width(), vit.options()),
      prototypes_(at::zeros({0, 0, vit.width()}, vit.options())),
      task_sizes_(at::zeros({0}, at::kLong)) {}

// ---- Training ----

void Ease::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  NTKCL_CHECK(adapters_.branches() == task.index && prototypes_.size(0) == task.n_old, "state",
              "expected adapters of ", task.index, " tasks and prototypes of ", task.n_old,
              " classes, got ", adapters_.branches(), " and ", prototypes_.size(0));
  const nn::AdapterList fresh =
      fresh_adapters(vit_, options_.rank, {"adapter.down", task.index}, services.random());
  adapters_ = adapters_.joined({fresh.down_weight.unsqueeze(0), fresh.down_bias.unsqueeze(0),
                                fresh.up_weight.unsqueeze(0), fresh.up_bias.unsqueeze(0)});
  head_.grow(0, task.n_new, task.index, services.random());
}

std::vector<optim::ParameterGroup> Ease::trained(const TaskInfo& task) {
  current_ = adapters_.branch(task.index);
  first_class_ = task.n_old;
  return head_.trained(current_.tensors(), {0, task.n_new});
}

Losses Ease::gradients(const Batch& batch, const StepInfo&, TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  const at::Tensor features =
      nn::channel_pass(vit_, vit_.prefix(batch.images), current_, options_.scale);
  return head_.gradients(batch.whole(features), batch.labels - first_class_, services);
}

// ---- After training ----

std::vector<std::string> Ease::stages(const TaskInfo&) const {
  return {"prototypes"};
}

void Ease::run_stage(const std::string& stage, TaskServices& services) {
  const at::NoGradGuard no_grad;
  const TaskInfo& task = services.task();
  const int64_t t = task.index, c = vit_.width();
  head_ = SoftmaxHead(options_.head, c, vit_.options());
  stats::ClassMeans means(task.n_old, task.n_new, (t + 1) * c);
  services.for_each_image(stage, [&](const Batch& batch) {
    means.add(batch.whole(features_of(batch.images)), batch.labels);
  });
  const at::Tensor fresh = means.result(prototypes_.scalar_type()).view({task.n_new, t + 1, c});
  std::vector<at::Tensor> mapped{prototypes_.new_zeros({0, c})};
  int64_t first = 0;
  for (int64_t old = 0; old < t; ++old) {
    const auto classes = task_sizes_[old].item<int64_t>();
    mapped.push_back(mapped_prototypes(prototypes_.narrow(0, first, classes).select(1, old),
                                       fresh.select(1, old), fresh.select(1, t)));
    first += classes;
  }
  prototypes_ = at::cat({at::cat({prototypes_, at::cat(mapped).unsqueeze(1)}, 1), fresh});
  task_sizes_ = at::cat({task_sizes_, at::full({1}, task.n_new, at::kLong)});
}

// ---- Inference ----

Scores Ease::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const at::Tensor features = features_of(images).view({images.size(0), -1, vit_.width()});
  return {ensemble_scores(features, prototypes_, own_subspaces(), options_.alpha)};
}

at::Tensor Ease::own_subspaces() const {
  const at::Tensor ends = task_sizes_.cumsum(0);
  const at::Tensor classes = at::arange(prototypes_.size(0), at::kLong).unsqueeze(1);
  return classes.lt(ends).logical_and(classes.ge(ends - task_sizes_)).to(prototypes_.device());
}

// Subspace by subspace: all at once would need the memory of as many images.
at::Tensor Ease::features_of(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const nn::Prefix prefix = vit_.prefix(images);
  std::vector<at::Tensor> subspaces;
  for (int64_t t = 0; t < adapters_.branches(); ++t) {
    subspaces.push_back(nn::channel_pass(vit_, prefix, adapters_.branch(t), options_.scale));
  }
  return at::cat(subspaces, 1);
}

// ---- State ----

void Ease::visit_state(const StateVisitor& visitor) {
  visitor("adapters.down.weight", adapters_.down_weight);
  visitor("adapters.down.bias", adapters_.down_bias);
  visitor("adapters.up.weight", adapters_.up_weight);
  visitor("adapters.up.bias", adapters_.up_bias);
  head_.visit_state("head.", visitor);
  visitor("prototypes", prototypes_);
  visitor("task_sizes", task_sizes_);
  check_state();
}

// Tensors that came from outside fit each other.
void Ease::check_state() const {
  const int64_t l = vit_.depth(), r = options_.rank, c = vit_.width();
  const at::Tensor& of_tasks = adapters_.down_bias;
  const int64_t n = of_tasks.dim() == 3 ? of_tasks.size(0) : 0, finished = task_sizes_.numel();
  const auto expect = [](const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    NTKCL_CHECK(tensor.sizes() == sizes, "state", name, ": expected ", sizes, ", got ",
                tensor.sizes());
  };
  expect("adapters.down.weight", adapters_.down_weight, {n, l, r, c});
  expect("adapters.down.bias", adapters_.down_bias, {n, l, r});
  expect("adapters.up.weight", adapters_.up_weight, {n, l, c, r});
  expect("adapters.up.bias", adapters_.up_bias, {n, l, c});
  expect("task_sizes", task_sizes_, {finished});
  const int64_t seen = prototypes_.dim() == 3 ? prototypes_.size(0) : 0;
  NTKCL_CHECK(task_sizes_.gt(0).all().item<bool>() && task_sizes_.le(seen).all().item<bool>() &&
                  task_sizes_.sum().item<int64_t>() == seen,
              "state", "task_sizes: expected positive numbers, ", seen, " in all");
  NTKCL_CHECK(finished <= n && n <= finished + 1, "state", "adapters.*: expected those of ",
              finished, " finished tasks, or of one more, got ", n);
  expect("prototypes", prototypes_, {seen, finished, c});
}

}  // namespace ntkcl::methods::ease
