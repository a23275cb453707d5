#include "ntkcl/methods/lorac_ipc/lorac_ipc.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ntkcl/core/error.h"
#include "ntkcl/methods/gathering.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/optim/gradient_clipping.h"
#include "ntkcl/stats/drift.h"
#include "ntkcl/stats/kmeans.h"

namespace ntkcl::methods::lorac_ipc {
namespace {

constexpr const char* kWhere = "lorac-ipc";
constexpr double kHeadDeviation = 0.02;  // of the head's first weights
constexpr double kCovarianceEps = 1e-4;  // of full covariances for the head's alignment
constexpr double kForgotten = 1e-9;      // share of an importance that may be left out
constexpr int64_t kQuery = 0, kKey = 1;  // places in nn::kMatrixTypes

// (L, g) of a table (types, L), in the tensors' type.
at::Tensor of_group(const at::Tensor& table, const nn::LoraGroup& group) {
  return table.narrow(0, group.first_type, group.types()).t().to(group.down.options());
}

Head copy_of(const Head& head) {
  const auto copy = [](const at::Tensor& t) { return t.defined() ? t.detach().clone() : t; };
  return {copy(head.weight), copy(head.bias), copy(head.norm_weight), copy(head.norm_bias)};
}

}  // namespace

LoracIpc::LoracIpc(Options options, const nn::VisionTransformer& vit, int64_t tasks)
    : options_(std::move(options)),
      vit_(vit),
      tasks_(tasks),
      lora_(vit, options_.placement == "all",
            options_.lora_depth > 0 ? options_.lora_depth : vit.depth(), options_.rank),
      full_(vit.width(), vit.options()),
      seen_(vit.width(), vit.options()) {
  mask_ = at::ones({lora_.types(), lora_.blocks()}, at::kDouble);
  NTKCL_CHECK(options_.selection != "release" || options_.new_mask || options_.ipc_threshold == 0 ||
                  std::floor(static_cast<double>(mask_.numel()) * options_.ipc_threshold) >= 1,
              kWhere, "'ipc_threshold': the released selection cannot freeze 0 of ", mask_.numel(),
              " matrices: expected 0 or at least 1 / ", mask_.numel(), ", got ",
              options_.ipc_threshold);
  NTKCL_CHECK(options_.alignment || options_.drift == "off", kWhere,
              "'drift': expected off without alignment, whose means it moves, got ",
              options_.drift);
  NTKCL_CHECK(options_.init != "orthogonal" || tasks * options_.rank <= vit.width(), kWhere,
              "'init': expected at most ", vit.width(), " orthogonal columns for ", tasks,
              " tasks of rank ", options_.rank, ", got ", tasks * options_.rank);
  for (const nn::LoraGroup& group : lora_.groups()) {
    bank_.push_back(at::zeros({lora_.blocks(), group.types(), 0, 0}, vit.options()));
  }
  const int64_t c = vit.width();
  head_ = {at::zeros({0, c}, vit.options()), at::zeros({0}, vit.options()), {}, {}};
  if (trains_norm()) {
    head_.norm_weight = at::ones({c}, vit.options());
    head_.norm_bias = at::zeros({c}, vit.options());
  }
  trained_head_ = copy_of(head_);  // of its own: a state is loaded into both
  task_sizes_ = at::zeros({0}, at::kLong);
  class_ids_ = at::zeros({0}, at::kLong);
  clusters_ = {at::zeros({0, options_.alignment_clusters, c}, vit.options()),
               at::zeros({0, options_.alignment_clusters, c}, vit.options())};
  before_ = at::zeros({0, c}, vit.options());
  begin_importance();
}

// ---- Training ----

void LoracIpc::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  recent_ = {};
  class_ids_ = at::tensor(task.class_ids, at::kLong);
  if (trained_head_.weight.size(0) > 0) {
    head_ = copy_of(trained_head_);
  }
  initialise_head(task.n_classes(), services.random());
  before_ = at::zeros({0, vit_.width()}, vit_.options());
  if (!task.first() && drifts()) {
    std::vector<at::Tensor> rows;
    services.for_each_image("features before training", [&](const Batch& batch) {
      rows.push_back(batch.whole(features(last_task(), batch.images)));
    });
    before_ = gathered(rows, task);
  }
  begin_module(task, services.random());
  begin_importance();
}

void LoracIpc::begin_importance() {
  importance_.clear();
  if (options_.ipc_threshold > 0) {
    importance_.assign(
        by_entry() ? lora_.groups().size() : 1,
        ImportanceAverage(options_.importance_decay, options_.uncertainty_decay,
                          options_.importance_average == "epoch",
                          by_entry() ? vit_.options() : vit_.options().dtype(at::kDouble)));
  }
}

// Only the current module, the old weights and the task's rows of the head move (section 9.5).
std::vector<optim::ParameterGroup> LoracIpc::trained(const TaskInfo& task) {
  training_ = {};
  training_.task = task;
  for (const nn::LoraGroup& group : lora_.groups()) {
    const at::NoGradGuard no_grad;
    training_.penalties.emplace_back(group.old_down.flatten(0, 1));
    training_.unfrozen.push_back(of_group(mask_, group));
  }
  lora_.train(current_mask(), mask_);
  training_.head_weight = head_.weight.narrow(0, task.n_old, task.n_new).detach();
  training_.head_bias = head_.bias.narrow(0, task.n_old, task.n_new).detach();
  optim::ParameterGroup modules{.name = "lora",
                                .parameters = {training_.head_weight, training_.head_bias}};
  optim::ParameterGroup omega{.name = "omega",
                              .parameters = {},
                              .learning_rate_scale = options_.omega_lr_factor,
                              .decays = false};
  if (trains_norm()) {
    modules.parameters.push_back(head_.norm_weight);
    modules.parameters.push_back(head_.norm_bias);
  }
  for (const nn::LoraGroup& group : lora_.groups()) {
    modules.parameters.push_back(group.down);
    modules.parameters.push_back(group.up);
    omega.parameters.push_back(group.omega);
  }
  std::vector<optim::ParameterGroup> groups{modules};
  if (!task.first()) {
    groups.push_back(omega);
  }
  for (const optim::ParameterGroup& group : groups) {
    for (const at::Tensor& parameter : group.parameters) {
      parameter.requires_grad_(true);
      training_.parameters.push_back(parameter);
    }
  }
  return groups;
}

void LoracIpc::initialise_head(int64_t classes, RandomSource& random) {
  const int64_t known = head_.weight.size(0), more = classes - known;
  if (more <= 0) {
    return;
  }
  const at::Tensor weight =
      random.normal({"head.weight"}, {classes, vit_.width()}, vit_.options()) * kHeadDeviation;
  const at::Tensor bias = random.uniform({"head.bias"}, {classes}, 0.0, 0.0, vit_.options());
  head_.weight = at::cat({head_.weight, weight.narrow(0, known, more)});
  head_.bias = at::cat({head_.bias, bias.narrow(0, known, more)});
}

void LoracIpc::begin_module(const TaskInfo& task, RandomSource& random) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(options_.rank));
  lora_.begin([&](int64_t type, int64_t block, const at::Tensor& old) {
    const Draw draw{"lora.down", task.index, 0, type, block};
    const std::vector<int64_t> sizes{old.size(0), options_.rank};
    if (options_.init == "uniform") {
      return random.uniform(draw, sizes, -bound, bound, vit_.options());
    }
    // The last columns of an orthonormal basis of [A_0 ... A_{t-1}, a Gaussian].
    const at::Tensor columns = at::cat({old, random.normal(draw, sizes, vit_.options())}, 1);
    return std::get<0>(at::linalg_qr(columns)).narrow(1, old.size(1), options_.rank);
  });
}

at::Tensor LoracIpc::current_mask() const {
  at::Tensor current = mask_.clone();
  if (options_.k_mask == "query") {  // 12.1
    current[kKey] = mask_[kQuery];
  }
  return current;
}

bool LoracIpc::measures(const StepInfo& step) const {
  if (importance_.empty() || step.pass > 0) {
    return false;
  }
  const bool all = options_.importance_average == "ema" && options_.importance_window == 0 &&
                   head_.weight.scalar_type() == at::kDouble;
  return all || step.steps == 0 || step.step >= step.steps - importance_window(step);
}

// The share of a step in a running mean, after k more, is at most decay^k.
int64_t LoracIpc::importance_window(const StepInfo& step) const {
  if (options_.importance_average == "epoch") {
    return step.epoch_steps > 0 ? step.epoch_steps : step.steps;
  }
  if (options_.importance_window > 0) {
    return options_.importance_window;
  }
  const double decay = std::max(options_.importance_decay, options_.uncertainty_decay);
  return decay > 0 ? static_cast<int64_t>(std::ceil(std::log(kForgotten) / std::log(decay))) : 1;
}

LoracIpc::Probes LoracIpc::make_probes(bool entries) const {
  Probes probes{.entries = entries};
  const auto leaf = [&](at::IntArrayRef sizes) {
    probes.leaves.push_back(at::zeros(sizes, head_.weight.options()).requires_grad_(true));
    return probes.leaves.back();
  };
  if (entries) {
    for (const nn::LoraGroup& group : lora_.groups()) {
      probes.parts.emplace_back();
      for (int64_t l = 0; l < lora_.blocks(); ++l) {
        probes.parts.back().push_back(leaf(group.pretrained.sizes().slice(1)));
      }
    }
  } else {
    const at::Tensor table = leaf(mask_.sizes());
    for (const nn::LoraGroup& group : lora_.groups()) {
      probes.parts.push_back(table.narrow(0, group.first_type, group.types()).unbind(1));
    }
  }
  return probes;
}

void LoracIpc::add_importance(const Probes& probes) {
  // Without a gradient where every matrix is frozen.
  const auto of = [](const at::Tensor& leaf) {
    return leaf.grad().defined() ? leaf.grad() : leaf.detach();
  };
  if (!probes.entries) {
    importance_[0].add(of(probes.leaves[0]).to(at::kDouble));
    return;
  }
  std::vector<at::Tensor> of_types;
  for (size_t i = 0; i < probes.parts.size(); ++i) {
    std::vector<at::Tensor> blocks;
    for (const at::Tensor& leaf : probes.parts[i]) {
      blocks.push_back(of(leaf));
    }
    const at::Tensor of_entries = at::stack(blocks).abs_();  // (L, g, out, in)
    if (by_entry()) {
      importance_[i].add(of_entries);
    } else {
      of_types.push_back(of_entries.mean({2, 3}, false, at::kDouble).t());
    }
  }
  if (!by_entry()) {
    importance_[0].add(at::cat(of_types));
  }
}

at::Tensor LoracIpc::score() const {
  if (importance_.empty() || importance_[0].mean().numel() == 0) {
    return {};
  }
  if (!by_entry()) {
    return importance_[0].score();
  }
  std::vector<at::Tensor> of_types;
  for (const ImportanceAverage& average : importance_) {
    of_types.push_back(average.score().mean({2, 3}, false, at::kDouble).t());
  }
  return at::cat(of_types);
}

Losses LoracIpc::gradients(const Batch& batch, const StepInfo& step, TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  const bool measure = measures(step);
  // The absolute value of an entry's importance comes after the sum over the ranks.
  const bool entries = by_entry() || batch.rows.shared();
  const Probes probes = measure ? make_probes(entries) : Probes();
  const at::Tensor tokens =
      nn::pass_with_products(vit_, batch.images, lora_.products(probes.parts));
  const at::Tensor feature = batch.whole(
      trains_norm() ? at::layer_norm(tokens.select(1, 0), {vit_.width()}, head_.norm_weight,
                                     head_.norm_bias, nn::kLayerNormEps)
                    : vit_.class_feature(tokens));
  // Classes of other tasks are at minus infinity: as if they were not there.
  const at::Tensor ce =
      at::cross_entropy_loss(at::linear(feature, training_.head_weight, training_.head_bias),
                             batch.labels - training_.task.n_old);
  ce.backward();
  services.average_gradients(probes.leaves);
  if (measure) {
    add_importance(probes);
  }
  const at::Tensor penalty = penalise();
  const at::Tensor norm = optim::clip_grad_norm_(training_.parameters, options_.clip_norm);
  const at::Tensor loss = ce.detach();
  return {{"ce", loss},
          {"l_orth", penalty},
          {"grad_norm", norm},
          {"total", loss + options_.lambda * penalty}};
}

at::Tensor LoracIpc::penalise() const {
  const at::NoGradGuard no_grad;
  at::Tensor total = at::zeros({}, vit_.options());
  for (size_t i = 0; i < lora_.groups().size(); ++i) {
    const nn::LoraGroup& group = lora_.groups()[i];
    const at::Tensor unfrozen = training_.unfrozen[i];
    const Orthogonality::Result result = training_.penalties[i](group.down.detach().flatten(0, 1));
    const at::Tensor gradient =
        result.gradient.view_as(group.down) * unfrozen.unsqueeze(2).unsqueeze(3);
    at::Tensor& grad = group.down.mutable_grad();
    grad = grad.defined() ? grad.add_(gradient, options_.lambda) : gradient * options_.lambda;
    total = total + (result.values * unfrozen.flatten()).sum();
  }
  return total;
}

// ---- After training ----

std::vector<std::string> LoracIpc::stages(const TaskInfo& task) const {
  std::vector<std::string> stages{"freezing"};
  if (options_.alignment || infers()) {
    stages.push_back("statistics");
  }
  if (options_.alignment && !task.first()) {
    stages.push_back("alignment");
  }
  return stages;
}

void LoracIpc::run_stage(const std::string& stage, TaskServices& services) {
  const at::NoGradGuard no_grad;
  if (stage == "freezing") {
    freeze();
  } else if (stage == "statistics") {
    gather_statistics(services);
  } else {
    align(services);
  }
}

void LoracIpc::freeze() {
  const int64_t t = training_.task.index;
  task_sizes_ = at::cat({task_sizes_, at::full({1}, training_.task.n_new, at::kLong)});
  lora_.finish();
  for (size_t i = 0; i < bank_.size(); ++i) {
    bank_[i] = at::constant_pad_nd(bank_[i], {0, 1, 0, 1});
    bank_[i].select(2, t).copy_(lora_.groups()[i].omega);
  }
  // Without a score where no step was measured: all images of the last ones were corrupt.
  if (const at::Tensor scores = score(); scores.defined()) {
    mask_ = freeze_important(mask_, scores,
                             {.threshold = options_.ipc_threshold,
                              .of_new = options_.new_mask,
                              .rule = options_.selection});
  }
  begin_importance();
  if (trains_norm()) {
    first_ = {};
  }
  recent_ = {};
}

void LoracIpc::gather_statistics(TaskServices& services) {
  const TaskInfo& task = services.task();
  std::vector<at::Tensor> own, first, labels;
  const bool same = task.first() && options_.alignment && infers();
  services.for_each_image("statistics", [&](const Batch& batch) {
    if (options_.alignment) {
      own.push_back(batch.whole(features(task.index, batch.images)));
    }
    if (infers()) {
      first.push_back(same ? own.back() : batch.whole(features(0, batch.images)));
    }
    labels.push_back(batch.labels);
  });
  const std::vector<at::Tensor> rows_of = rows_of_classes(gathered(labels, task), task);
  if (infers()) {
    add_gaussians(nn::unit_rows(at::cat(first)), rows_of, services);
  }
  if (options_.alignment) {
    const at::Tensor rows = at::cat(own);
    drift(rows);
    if (aligns_full()) {
      add_full(rows, rows_of);
    } else {
      add_clusters(rows, rows_of, services);
    }
  }
}

// Section 6.
void LoracIpc::add_gaussians(const at::Tensor& rows, const std::vector<at::Tensor>& rows_of,
                             TaskServices& services) {
  const TaskInfo& task = services.task();
  gaussians_.keep(task.n_old);
  for (int64_t c = task.n_old; c < task.n_seen(); ++c) {
    services.progress("task inference", c - task.n_old, task.n_new);
    const at::Tensor x = rows.index_select(0, rows_of[static_cast<size_t>(c - task.n_old)]);
    const at::Tensor of = cluster(x, options_.inference_clusters,
                                  {"inference.clusters", task.index, 0, c}, services.random());
    NTKCL_CHECK(options_.small_clusters != "error" || at::bincount(of).gt(1).all().item<bool>(),
                kWhere, "class ", class_ids_[c].item<int64_t>(),
                ": expected at least two images in each of ", options_.inference_clusters,
                " clusters, got a cluster of one; small_clusters = shrink allows it");
    gaussians_.add_class(x, of);
  }
}

// Section 7.
void LoracIpc::add_clusters(const at::Tensor& rows, const std::vector<at::Tensor>& rows_of,
                            TaskServices& services) {
  const TaskInfo& task = services.task();
  const int64_t k = options_.alignment_clusters;
  std::vector<at::Tensor> means{clusters_.means.narrow(0, 0, task.n_old)};
  std::vector<at::Tensor> variances{clusters_.variances.narrow(0, 0, task.n_old)};
  for (int64_t c = task.n_old; c < task.n_seen(); ++c) {
    services.progress("clusters", c - task.n_old, task.n_new);
    const at::Tensor x = rows.index_select(0, rows_of[static_cast<size_t>(c - task.n_old)]);
    const at::Tensor of =
        cluster(x, k, {"alignment.clusters", task.index, 0, c}, services.random());
    const auto [mean, variance] = cluster_moments(x, of, of.max().item<int64_t>() + 1);
    // Clusters that a small class does not have are never drawn from.
    const auto padded = [&](const at::Tensor& moments) {
      return at::constant_pad_nd(moments, {0, 0, 0, k - moments.size(0)}).unsqueeze(0);
    };
    means.push_back(padded(mean));
    variances.push_back(padded(variance));
  }
  clusters_ = {at::cat(means), at::cat(variances)};
}

void LoracIpc::add_full(const at::Tensor& rows, const std::vector<at::Tensor>& rows_of) {
  const double eps = aligns_like_raa() ? GaussianAlignmentOptions().covariance_eps : kCovarianceEps;
  full_.keep(training_.task.n_old);
  for (const at::Tensor& of_class : rows_of) {
    full_.add_class(rows.index_select(0, of_class), eps);
  }
}

void LoracIpc::drift(const at::Tensor& after) {
  if (before_.size(0) == 0) {
    return;
  }
  const int64_t old = training_.task.n_old;
  if (aligns_full()) {
    full_.keep(old);
    full_.move(stats::gaussian_drift(before_, after, full_.means(), options_.sigma));
  } else {
    const at::Tensor means = clusters_.means.narrow(0, 0, old).flatten(0, 1);
    const at::Tensor shift = stats::gaussian_drift(before_, after, means, options_.sigma);
    clusters_.means = (means + shift).view({old, -1, means.size(1)});
    clusters_.variances = clusters_.variances.narrow(0, 0, old);
  }
  before_ = at::zeros({0, vit_.width()}, vit_.options());
}

at::Tensor LoracIpc::cluster(const at::Tensor& rows, int64_t clusters, const Draw& draw,
                             RandomSource& random) const {
  if (const auto given = random.recorded(draw)) {
    return given->to(rows.device(), at::kLong);
  }
  NTKCL_CHECK(options_.small_clusters != "error" || rows.size(0) >= clusters, kWhere, "class ",
              class_ids_[draw.list].item<int64_t>(), ": expected at least ", clusters,
              " images for as many clusters, got ", rows.size(0),
              "; with small_clusters = shrink it has fewer clusters");
  const at::Tensor draws = random.uniform(draw, {clusters}, 0.0, 1.0, at::kDouble);
  return stats::kmeans(rows, stats::kmeans_plus_plus(rows, draws)).labels;
}

void LoracIpc::align(TaskServices& services) {
  const TaskInfo& task = services.task();
  services.evaluate("before alignment");
  if (!options_.train_aligned_head) {
    trained_head_ = copy_of(head_);
  }
  const Head aligned = copy_of(head_);  // a repeated stage begins from head_ again
  if (aligns_like_raa()) {
    const GaussianAlignmentOptions published;
    const Head seen{aligned.weight.narrow(0, 0, task.n_seen()),
                    aligned.bias.narrow(0, 0, task.n_seen()), aligned.norm_weight,
                    aligned.norm_bias};
    align_on_gaussians(
        trained_of(seen), [&](const at::Tensor& x) { return logits_of(seen, x, task.n_seen()); },
        full_, mean_factors(task.tasks_of_classes(), task.index, published.lowest_mean), published,
        gaussian_draws(services, full_, published));
  } else {
    align_on_draws(aligned, services);
  }
  head_ = aligned;
}

// Section 7.
void LoracIpc::align_on_draws(const Head& head, TaskServices& services) const {
  const TaskInfo& task = services.task();
  RandomSource& random = services.random();
  const AlignmentDraws draws{
      .permutation =
          [&](int64_t epoch, int64_t count) {
            services.progress("alignment", epoch, options_.alignment_epochs);
            return random.permutation({"alignment.order", task.index, epoch}, count);
          },
      .normals =
          [&](int64_t epoch, const at::Tensor& numbers) {
            const Draw draw{"alignment.normals", task.index, epoch};
            if (const auto all = random.recorded(draw)) {
              return all->reshape({-1, vit_.width()}).index_select(0, numbers).to(vit_.options());
            }
            return random.normal(draw, {numbers.size(0), vit_.width()}, vit_.options());
          }};
  const FeatureDraws drawn = aligns_full() ? draws_of(full_, options_.alignment_draws)
                                           : draws_of(clusters_, options_.alignment_draws);
  align_head(head, drawn, task.n_old,
             {.epochs = options_.alignment_epochs,
              .learning_rate = options_.alignment_learning_rate,
              .rows = options_.alignment_draws},
             draws);
}

// ---- Inference ----

std::shared_ptr<const nn::VisionTransformer> LoracIpc::snapshot(int64_t task) const {
  NTKCL_CHECK(0 <= task && task <= last_task(), kWhere, "expected a finished task, got ", task,
              " of ", task_sizes_.size(0));
  const std::lock_guard lock(snapshots_);
  Snapshot& kept = task == 0 ? first_ : recent_;
  if (kept.task != task) {
    kept = {};  // before another takes its place in memory
    std::vector<at::Tensor> omega;
    for (const at::Tensor& bank : bank_) {
      omega.push_back(bank.select(2, task).narrow(2, 0, task + 1));
    }
    nn::VisionTransformer vit = vit_.with_weights(lora_.merged(omega));
    if (trains_norm()) {
      vit = vit.with_final_norm(head_.norm_weight, head_.norm_bias);
    }
    kept = {task, std::make_shared<const nn::VisionTransformer>(std::move(vit))};
  }
  return kept.vit;
}

at::Tensor LoracIpc::features(int64_t task, const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const auto vit = snapshot(task);
  return nn::plain_pass(*vit, vit->prefix(images));
}

int64_t LoracIpc::n_seen() const {
  return task_sizes_.sum().item<int64_t>();
}

at::Tensor LoracIpc::logits(const at::Tensor& features) const {
  const int64_t classes =
      options_.mask_unseen || !infers() ? n_seen() : head_.weight.size(0);  // 12.3
  return at::linear(features, head_.weight.narrow(0, 0, classes).detach(),
                    head_.bias.narrow(0, 0, classes).detach());
}

at::Tensor LoracIpc::tasks_of_numbers(const at::Tensor& classes) const {
  return at::repeat_interleave(task_sizes_).index_select(0, classes.cpu());
}

at::Tensor LoracIpc::tasks_of(const at::Tensor& nearest) const {
  if (options_.class_lookup == "class") {
    return tasks_of_numbers(nearest);
  }
  // 12.4: a place among the classes seen is taken for the data set's class. One that is not learned
  // yet has the newest snapshot.
  at::Tensor by_id = at::full_like(class_ids_, last_task());
  by_id.index_copy_(0, class_ids_.narrow(0, 0, n_seen()), at::repeat_interleave(task_sizes_));
  return by_id.index_select(0, nearest.cpu());
}

// Without task inference the task is that of the prediction.
Scores LoracIpc::scores_of(const at::Tensor& features, const at::Tensor& tasks) const {
  at::Tensor classes = logits(features);
  if (!infers()) {
    return {classes, tasks_of_numbers(classes.argmax(1))};
  }
  if (options_.predict_within_task) {
    at::Tensor task_of = at::full({classes.size(1)}, -1, at::kLong);
    task_of.narrow(0, 0, n_seen()).copy_(at::repeat_interleave(task_sizes_));
    const at::Tensor elsewhere = task_of.unsqueeze(0).ne(tasks.unsqueeze(1)).to(classes.device());
    // Low, but finite: no score is infinite.
    classes = classes.masked_fill(elsewhere, std::numeric_limits<float>::lowest());
  }
  return {classes, tasks};
}

Scores LoracIpc::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  if (!infers()) {
    return scores_of(features(last_task(), images), {});
  }
  const at::Tensor first = features(0, images);
  const at::Tensor tasks = tasks_of(gaussians_.distances(nn::unit_rows(first)).argmin(1));
  at::Tensor chosen = first.clone();
  for (const at::Tensor& present : std::get<0>(at::_unique(tasks)).unbind(0)) {
    const auto task = present.item<int64_t>();
    if (task > 0) {
      const at::Tensor rows = tasks.eq(task).nonzero().squeeze(1).to(images.device());
      chosen.index_copy_(0, rows, features(task, images.index_select(0, rows)));
    }
  }
  return scores_of(chosen, tasks);
}

void LoracIpc::score(TestImages& images, const ScoresFn& fn) {
  const at::NoGradGuard no_grad;
  if (trains_norm()) {  // no snapshot keeps its features
    seen_.clear();
  }
  // New images begin with snapshot 0, by which tasks are inferred, or with the last.
  const int64_t begin = infers() ? 0 : last_task();
  std::vector<at::Tensor> numbers, labels, rows;
  images.for_each_batch(seen_.unknown(images.numbers()), [&](const Batch& batch) {
    numbers.push_back(batch.numbers);
    labels.push_back(batch.labels);
    rows.push_back(batch.whole(features(begin, batch.images)));
  });
  if (!numbers.empty()) {
    seen_.add(at::cat(numbers), at::cat(labels), at::cat(rows), begin);
  }
  if (seen_.size() == 0) {
    return;
  }
  const at::Tensor tasks = chosen_tasks();
  for (const auto& [task, missing] : seen_.choose(tasks)) {
    images.for_each_batch(missing, [&, task = task](const Batch& batch) {
      seen_.set(batch.numbers, batch.whole(features(task, batch.images)));
    });
  }
  // In the order of the images, whenever they were first seen.
  const at::Tensor places = seen_.places_of(images.numbers());
  const at::Tensor on_device = places.to(seen_.features().device());
  fn(seen_.labels().index_select(0, on_device),
     scores_of(seen_.features().index_select(0, on_device), tasks.index_select(0, places)));
}

// The snapshot by which each test image seen is classified.
at::Tensor LoracIpc::chosen_tasks() {
  if (!infers()) {
    return at::full({seen_.size()}, last_task(), at::kLong);
  }
  seen_.update_nearest(gaussians_.classes(), [&](const at::Tensor& features, int64_t first) {
    return gaussians_.distances(nn::unit_rows(features), first);
  });
  const at::Tensor tasks = tasks_of(seen_.nearest());
  return options_.inference == "vote_by_test_task" ? votes(tasks, tasks_of_numbers(seen_.labels()))
                                                   : tasks;
}

// ---- State ----

void LoracIpc::visit_state(const StateVisitor& visitor) {
  bool changed = false;
  const StateVisitor visit = [&](const std::string& name, at::Tensor& tensor) {
    const auto* before = tensor.unsafeGetTensorImpl();
    const auto version = tensor._version();
    visitor(name, tensor);
    changed = changed || tensor.unsafeGetTensorImpl() != before || tensor._version() != version;
  };
  const auto visit_head = [&](const std::string& prefix, Head& head) {
    visit(prefix + "weight", head.weight);
    visit(prefix + "bias", head.bias);
    if (trains_norm()) {
      visit(prefix + "norm.weight", head.norm_weight);
      visit(prefix + "norm.bias", head.norm_bias);
    }
  };
  for (size_t i = 0; i < lora_.groups().size(); ++i) {
    nn::LoraGroup& group = lora_.groups()[i];
    const std::string prefix = std::string(group.name) + ".";
    visit(prefix + "down", group.down);
    visit(prefix + "up", group.up);
    visit(prefix + "old_down", group.old_down);
    visit(prefix + "old_up", group.old_up);
    visit(prefix + "omega", group.omega);
    visit(prefix + "bank", bank_[i]);
  }
  visit("mask", mask_);
  visit_head("head.", head_);
  if (!options_.train_aligned_head) {
    visit_head("trained_head.", trained_head_);
  }
  visit("task_sizes", task_sizes_);
  visit("class_ids", class_ids_);
  visit("alignment.means", clusters_.means);
  visit("alignment.variances", clusters_.variances);
  full_.visit_state("alignment.full.", visit);
  visit("features_before", before_);
  gaussians_.visit_state("inference.", vit_.options(), visit);
  for (size_t i = 0; i < importance_.size(); ++i) {
    const std::string group = by_entry() ? std::string(lora_.groups()[i].name) + "." : "";
    importance_[i].visit_state("importance." + group, visit);
  }
  if (changed) {
    check_state();
    first_ = {};
    recent_ = {};
    seen_.clear();
  }
}

void LoracIpc::visit_test_state(const StateVisitor& visitor) {
  seen_.visit_state("seen.", visitor);
}

// Tensors that came from outside fit each other.
void LoracIpc::check_state() const {
  const auto expect = [](const std::string& name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    NTKCL_CHECK(tensor.sizes() == sizes, "state", name, ": expected ", sizes, ", got ",
                tensor.sizes());
  };
  const at::Tensor& omega = lora_.groups().front().omega;  // tells the number of modules
  NTKCL_CHECK(omega.dim() == 3, "state", "omega: expected (blocks, types, modules), got ",
              omega.sizes());
  const int64_t l = lora_.blocks(), r = options_.rank, t = lora_.modules(), c = vit_.width();
  const int64_t finished = task_sizes_.numel();
  for (size_t i = 0; i < lora_.groups().size(); ++i) {
    const nn::LoraGroup& group = lora_.groups()[i];
    const std::string prefix = std::string(group.name) + ".";
    const int64_t g = group.types(), out = group.pretrained.size(2), in = group.pretrained.size(3);
    expect(prefix + "down", group.down, {l, g, in, r});
    expect(prefix + "up", group.up, {l, g, r, out});
    expect(prefix + "old_down", group.old_down, {l, g, in, t * r});
    expect(prefix + "old_up", group.old_up, {l, g, t * r, out});
    expect(prefix + "omega", group.omega, {l, g, t});
    expect(prefix + "bank", bank_[i], {l, g, finished, finished});
  }
  for (size_t i = 0; i < importance_.size(); ++i) {
    const at::Tensor& mean = importance_[i].mean();
    if (mean.sizes() != at::IntArrayRef({0})) {
      const auto& entries = lora_.groups()[i].pretrained;
      expect("importance.*", mean, by_entry() ? entries.sizes() : mask_.sizes());
    }
  }
  NTKCL_CHECK(t <= tasks_, "state", "expected modules of at most ", tasks_, " tasks, got ", t);
  expect("mask", mask_, {lora_.types(), l});
  expect("task_sizes", task_sizes_, {t});
  NTKCL_CHECK(t == 0 || task_sizes_.gt(0).all().item<bool>(), "state",
              "task_sizes: expected positive numbers");
  const int64_t seen = n_seen();
  for (const Head* head : {&head_, &trained_head_}) {
    NTKCL_CHECK(head->weight.dim() == 2 && head->weight.size(1) == c &&
                    head->bias.sizes() == head->weight.sizes().slice(0, 1) &&
                    (head != &head_ || head->weight.size(0) >= seen),
                "state", "head: expected weight (classes, ", c, ") and bias (classes) for ", seen,
                " classes or more, got ", head->weight.sizes(), " and ", head->bias.sizes());
    if (trains_norm()) {
      expect("head.norm.weight", head->norm_weight, {c});
      expect("head.norm.bias", head->norm_bias, {c});
    }
  }
  NTKCL_CHECK(class_ids_.dim() == 1 && (class_ids_.size(0) == 0 || class_ids_.size(0) >= seen),
              "state", "class_ids: expected ", seen, " or more, got ", class_ids_.sizes());
  NTKCL_CHECK(
      clusters_.means.dim() == 3 && clusters_.means.sizes() == clusters_.variances.sizes() &&
          clusters_.means.size(0) <= seen && clusters_.means.size(2) == c,
      "state", "alignment.*: expected means and variances (n, K, ", c, ") of at most ", seen,
      " classes, got ", clusters_.means.sizes(), " and ", clusters_.variances.sizes());
  NTKCL_CHECK(full_.classes() <= seen, "state", "alignment.full.*: expected at most ", seen,
              " classes, got ", full_.classes());
  NTKCL_CHECK(before_.dim() == 2 && before_.size(1) == c, "state", "features_before: expected (n, ",
              c, "), got ", before_.sizes());
  NTKCL_CHECK(gaussians_.classes() <= seen, "state", "inference.*: expected at most ", seen,
              " classes, got ", gaussians_.classes());
}

}  // namespace ntkcl::methods::lorac_ipc
