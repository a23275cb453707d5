#include "ntkcl/methods/raa/raa.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/methods/dropout.h"
#include "ntkcl/methods/gathering.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/stats/drift.h"

namespace ntkcl::methods::raa {
namespace {

constexpr const char* kWhere = "raa";
constexpr double kHeadDeviation = 0.02;  // of the head's first weights

}  // namespace

at::Tensor cosface(const at::Tensor& features, const at::Tensor& weight, const at::Tensor& labels,
                   double scale, double margin) {
  const at::Tensor true_class = at::one_hot(labels, weight.size(0)).to(weight.scalar_type());
  const at::Tensor logits = (nn::cosines(features, weight) - margin * true_class) * scale;
  return at::cross_entropy_loss(logits, labels, {}, at::Reduction::None);
}

at::Tensor shares_of(const at::Tensor& uniform, const std::string& kind) {
  NTKCL_CHECK(kind == "uniform_norm" || kind == "dirichlet", kWhere,
              "'alpha': expected uniform_norm or dirichlet, got '", kind, "'");
  const at::Tensor u = kind == "dirichlet" ? -at::log1p(-uniform) : uniform;
  const at::Tensor sum = u.sum(1, /*keepdim=*/true);
  const double equal = 1.0 / static_cast<double>(u.size(1));
  return at::where(sum.gt(0), u / sum, equal);
}

std::vector<int64_t> tasks_of_classes(const std::vector<int64_t>& sizes, const std::string& kind) {
  std::vector<int64_t> tasks;
  for (size_t t = 0; t < sizes.size(); ++t) {
    tasks.insert(tasks.end(), static_cast<size_t>(sizes[t]), static_cast<int64_t>(t));
  }
  if (kind == "release") {
    for (size_t c = 0; c < tasks.size(); ++c) {
      tasks[c] = static_cast<int64_t>(c) / sizes.back();
    }
  }
  return tasks;
}

Raa::Raa(Options options, const nn::VisionTransformer& vit, RandomSource& random)
    : options_(std::move(options)), vit_(vit), gaussians_(vit.width(), vit.options()) {
  NTKCL_CHECK(options_.n_adapters > 1 || !mixes(), kWhere,
              "'amalgamation': expected two adapters or more to mix, got n_adapters = 1; ",
              "amalgamation = none trains one");
  const int64_t l = vit.depth(), r = options_.rank, c = vit.width();
  branches_ = nn::BranchList::zeros(options_.n_adapters, l, r, c, vit.options());
  // Kaiming-uniform with a = sqrt(5); all else is zero (section 2.1).
  const double bound = 1.0 / std::sqrt(static_cast<double>(c));
  for (int64_t i = 0; i < options_.n_adapters; ++i) {
    branches_.down_weight[i].copy_(
        random.uniform({"adapter.down", 0, 0, i}, {l, r, c}, -bound, bound, vit.options()));
  }
  head_ = at::zeros({0, c}, vit.options());
  before_ = at::zeros({0, c}, vit.options());
  stale_ = at::zeros({0, c}, vit.options());
  task_sizes_ = at::zeros({0}, at::kLong);
  merged_ = at::zeros({1}, at::kLong);
}

// ---- Features ----

at::Tensor Raa::features(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return nn::channel_pass(vit_, vit_.prefix(images), branches_.branch(0), options_.scale);
}

Scores Raa::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return {nn::cosines(features(images), head_)};
}

// ---- Training ----

void Raa::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  NTKCL_CHECK(!options_.alignment.on || gaussians_.classes() == task.n_old, "state",
              "gaussians.*: expected the ", task.n_old, " classes learned before, got ",
              gaussians_.classes());
  const at::Tensor fresh = services.random().normal({"head.weight", task.index},
                                                    {task.n_new, vit_.width()}, vit_.options()) *
                           kHeadDeviation;
  head_ = at::cat({head_.narrow(0, 0, task.n_old).detach(), fresh});
  task_sizes_ =
      at::cat({task_sizes_.narrow(0, 0, task.index), at::full({1}, task.n_new, at::kLong)});
  before_ = at::zeros({0, vit_.width()}, vit_.options());
  if (!task.first() && drifts()) {
    before_ = drift_features("before", services);
  }
}

std::vector<optim::ParameterGroup> Raa::trained(const TaskInfo& task) {
  training_ = {};
  training_.task = task;
  shared_ = {};
  // From the second task on the merged branch is frozen (section 2.4).
  training_.frozen = !task.first() && options_.n_adapters > 1 ? 1 : 0;
  training_.branches =
      branches_.range(training_.frozen, options_.n_adapters - training_.frozen).detached();
  optim::ParameterGroup adapters{
      .name = "adapters", .parameters = training_.branches.tensors(), .stacked_dims = 2};
  // Old heads only decay: one tensor does, but where the release leaves a gradient over.
  const std::vector<int64_t> blocks = options_.stale_gradient || task.first()
                                          ? sizes()
                                          : std::vector<int64_t>{task.n_old, task.n_new};
  for (const at::Tensor& block : head_.split_with_sizes(blocks)) {
    training_.head.push_back(block.detach());
  }
  optim::ParameterGroup head{.name = "head", .parameters = training_.head};
  for (const optim::ParameterGroup* group : {&adapters, &head}) {
    for (const at::Tensor& parameter : group->parameters) {
      parameter.requires_grad_(true);
    }
  }
  return {adapters, head};
}

std::vector<nn::Dropout> Raa::dropout(const std::string& purpose, const StepInfo& step,
                                      const dist::Rows& rows, RandomSource& random) const {
  std::vector<nn::Dropout> of_blocks;
  if (options_.adapter_dropout == 0) {
    return of_blocks;
  }
  for (int64_t l = 0; l < vit_.depth(); ++l) {
    const Draw draw{purpose, training_.task.index, step.step, pass_of(step), l};
    of_blocks.push_back(dropout_of(draw, options_.adapter_dropout, random, rows, 1));
  }
  return of_blocks;
}

// The patch embedding and what of the first block no adapter changes; and the frozen streams, whose
// loss reaches the head alone (section 9). The second pass of a step finds them again, but for
// dropout that it draws anew.
void Raa::share(const Batch& batch, const StepInfo& step, RandomSource& random) {
  if (step.pass == 0) {
    shared_ = {};
    shared_.prefix = vit_.prefix(batch.images);
  }
  const bool same_noise = options_.share_noise || options_.adapter_dropout == 0;
  if (training_.frozen > 0 && (step.pass == 0 || !same_noise)) {
    const at::NoGradGuard no_grad;
    const bool mixed = options_.amalgamation == "code";
    shared_.frozen =
        nn::stream_pass(vit_, shared_.prefix, {.adapters = branches_.range(0, training_.frozen)},
                        options_.scale, dropout("adapter.dropout.frozen", step, batch.rows, random),
                        mixed ? &shared_.frozen_added : nullptr);
  }
}

// Of the branches that train and of their mixture with the frozen ones, alpha (L, NA).
nn::Streams Raa::streams(const at::Tensor& alpha) const {
  const nn::BranchList& trained = training_.branches;
  if (!mixes()) {
    return {.adapters = trained};
  }
  const int64_t f = training_.frozen;
  const at::Tensor of_frozen = alpha.narrow(1, 0, f);
  const at::Tensor of_trained = alpha.narrow(1, f, trained.branches());
  if (options_.amalgamation == "paper") {  // Eq. 5: weights, averaged before the product
    const nn::BranchList all = branches_.range(0, f).joined(trained);
    return {.adapters = trained.joined(all.mixed(alpha))};
  }
  nn::Streams streams{.adapters = trained, .shares = of_trained};
  for (size_t l = 0; l < shared_.frozen_added.size() && f > 0; ++l) {
    const at::Tensor shares = of_frozen.select(0, static_cast<int64_t>(l));
    streams.others.push_back((shared_.frozen_added[l] * shares.view({f, 1, 1, 1})).sum(0));
  }
  return streams;
}

Losses Raa::gradients(const Batch& batch, const StepInfo& step, TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  const TaskInfo& task = training_.task;
  RandomSource& random = services.random();
  share(batch, step, random);
  at::Tensor alpha;
  if (mixes()) {
    const auto draw_shares = [this](RandomSource& source, const Draw& draw) {
      const at::Tensor drawn =
          source.uniform(draw, {vit_.depth(), options_.n_adapters}, 0.0, 1.0, at::kDouble);
      return shares_of(drawn, options_.alpha).to(vit_.options().dtype());
    };
    alpha = random.placed({"amalgamation", task.index, step.step, pass_of(step)},
                          vit_.options().device(), draw_shares);
  }
  at::Tensor features =
      nn::stream_pass(vit_, shared_.prefix, streams(alpha), options_.scale,
                      dropout("adapter.dropout", step, batch.rows, random));  // (streams, b, C)
  if (training_.frozen > 0) {
    features = at::cat({shared_.frozen, features});
  }
  const auto [of_branches, of_mixture] = losses(batch.whole(features, 1), batch);
  const at::Tensor total = of_mixture.defined() ? of_branches + of_mixture : of_branches;
  total.backward();
  services.average_gradients({});
  for (size_t block = 0; block + 1 < training_.head.size(); ++block) {
    if (const at::Tensor stale = stale_of(block, step); stale.defined()) {
      training_.head[block].mutable_grad() = stale;
    }
  }
  Losses result{{"branches", of_branches.detach()}};
  if (of_mixture.defined()) {
    result.emplace_back("mixture", of_mixture.detach());
  }
  result.emplace_back("total", total.detach());
  return result;
}

// 8.6: in a task's first ascent.
at::Tensor Raa::stale_of(size_t block, const StepInfo& step) const {
  const bool applies = options_.stale_gradient && step.step == 0 && step.pass + 1 < step.passes;
  if (!applies || stale_.size(0) == 0) {
    return {};
  }
  const std::vector<int64_t> old = sizes();
  return stale_.split_with_sizes(at::IntArrayRef(old).slice(0, old.size() - 1))[block].clone();
}

// Over the task's own classes (section 3.1).
std::pair<at::Tensor, at::Tensor> Raa::losses(const at::Tensor& features,
                                              const Batch& batch) const {
  const int64_t b = batch.labels.size(0), branches = options_.n_adapters;
  const at::Tensor labels = (batch.labels - training_.task.n_old).repeat({features.size(0)});
  const at::Tensor rows = cosface(features.flatten(0, 1), training_.head.back(), labels,
                                  options_.logit_scale, options_.margin);
  const double weight = branches > 1 ? options_.branch_loss_weight : 1.0;
  const at::Tensor of_branches = weight * rows.narrow(0, 0, branches * b).mean();
  return {of_branches, mixes() ? rows.narrow(0, branches * b, b).mean() : at::Tensor()};
}

// ---- After training ----

std::vector<std::string> Raa::stages(const TaskInfo& task) const {
  std::vector<std::string> stages;
  if (options_.n_adapters > 1) {
    stages.push_back("merging");
  }
  if (options_.alignment.on) {
    stages.push_back("statistics");
    if (!task.first()) {
      stages.push_back("alignment");
    }
  }
  return stages;
}

void Raa::run_stage(const std::string& stage, TaskServices& services) {
  const at::NoGradGuard no_grad;
  shared_ = {};
  if (stage == "merging") {
    merge();
  } else if (stage == "statistics") {
    gather_statistics(services);
  } else {
    align(services);
  }
}

// Branch 1 becomes the mean of all (section 2.4); once, if the stage is repeated.
void Raa::merge() {
  if (merged_.item<int64_t>() > training_.task.index) {
    return;
  }
  const std::vector<at::Tensor> mean = branches_.mean().tensors();
  const std::vector<at::Tensor> merged = branches_.branch(0).tensors();
  for (size_t i = 0; i < merged.size(); ++i) {
    merged[i].copy_(mean[i]);
  }
  merged_.fill_(training_.task.index + 1);
}

at::Tensor Raa::drift_features(const std::string& when, TaskServices& services) const {
  std::vector<at::Tensor> parts;
  const BatchFn add = [&](const Batch& batch) {
    parts.push_back(batch.whole(features(batch.images)));
  };
  const std::string activity = "features " + when + " training";
  if (options_.drift == "paired") {
    services.for_each_image(activity, add);
  } else {
    services.for_each_augmented(activity, {"drift." + when, services.task().index}, add);
  }
  return gathered(parts, services.task());
}

void Raa::gather_statistics(TaskServices& services) {
  const TaskInfo& task = training_.task;
  std::vector<at::Tensor> parts, labels_of;
  services.for_each_image("statistics", [&](const Batch& batch) {
    parts.push_back(batch.whole(features(batch.images)));
    labels_of.push_back(batch.labels);
  });
  const at::Tensor rows = gathered(parts, task);
  const std::vector<at::Tensor> rows_of = rows_of_classes(at::cat(labels_of), task);
  gaussians_.keep(task.n_old);
  if (before_.size(0) > 0) {
    // Paired, the features of the statistics are those after training.
    const at::Tensor after = options_.drift == "paired" ? rows : drift_features("after", services);
    gaussians_.move(stats::gaussian_drift(before_, after, gaussians_.means(), options_.sigma));
    before_ = at::zeros({0, vit_.width()}, vit_.options());
  }
  for (const at::Tensor& of_class : rows_of) {
    gaussians_.add_class(rows.index_select(0, of_class), options_.alignment.covariance_eps);
  }
}

std::vector<int64_t> Raa::sizes() const {
  const int64_t* sizes = task_sizes_.const_data_ptr<int64_t>();
  return {sizes, sizes + task_sizes_.numel()};
}

void Raa::align(TaskServices& services) {
  const TaskInfo& task = training_.task;
  services.evaluate("before alignment");
  const at::Tensor aligned = head_.detach().clone();  // a repeated stage begins from head_ again
  const std::vector<int64_t> tasks = tasks_of_classes(sizes(), options_.kappa);
  const HeadTraining done = align_on_gaussians(
      {aligned},
      [&](const at::Tensor& x) { return nn::cosines(x, aligned) * options_.logit_scale; },
      gaussians_, mean_factors(tasks, task.index, options_.alignment.lowest_mean),
      options_.alignment, gaussian_draws(services, gaussians_, options_.alignment));
  head_ = aligned;
  if (options_.stale_gradient) {
    stale_ = done.gradients.front();
  }
}

// ---- State ----

void Raa::visit_state(const StateVisitor& visitor) {
  branches_.visit("branch", visitor);
  visitor("head", head_);
  visitor("task_sizes", task_sizes_);
  visitor("merged_tasks", merged_);
  gaussians_.visit_state("gaussians.", visitor);
  visitor("features_before", before_);
  visitor("stale_gradient", stale_);
  check_state();
}

// Tensors that came from outside fit each other.
void Raa::check_state() const {
  const int64_t c = vit_.width();
  NTKCL_CHECK(task_sizes_.dim() == 1 && task_sizes_.scalar_type() == at::kLong &&
                  task_sizes_.gt(0).all().item<bool>(),
              "state", "task_sizes: expected positive int64 numbers (tasks), got ",
              task_sizes_.toString(), task_sizes_.sizes());
  NTKCL_CHECK(merged_.sizes() == at::IntArrayRef({1}) && merged_.ge(0).all().item<bool>() &&
                  merged_.le(task_sizes_.numel()).all().item<bool>(),
              "state", "merged_tasks: expected a number up to ", task_sizes_.numel(), ", got ",
              merged_.sizes());
  const int64_t seen = task_sizes_.sum().item<int64_t>();
  NTKCL_CHECK(head_.sizes() == at::IntArrayRef({seen, c}), "state", "head: expected [", seen, ", ",
              c, "], got ", head_.sizes());
  NTKCL_CHECK(gaussians_.classes() <= seen, "state", "gaussians.*: expected at most ", seen,
              " classes, got ", gaussians_.classes());
  NTKCL_CHECK(before_.dim() == 2 && before_.size(1) == c, "state", "features_before: expected (n, ",
              c, "), got ", before_.sizes());
  // Of all classes, or of all but those of the task that is trained.
  const int64_t last = task_sizes_.numel() > 0 ? task_sizes_[-1].item<int64_t>() : 0;
  NTKCL_CHECK(stale_.dim() == 2 && stale_.size(1) == c &&
                  (stale_.size(0) == 0 || stale_.size(0) == seen || stale_.size(0) == seen - last),
              "state", "stale_gradient: expected (n, ", c, ") with n = 0, ", seen - last, " or ",
              seen, ", got ", stale_.sizes());
}

}  // namespace ntkcl::methods::raa
