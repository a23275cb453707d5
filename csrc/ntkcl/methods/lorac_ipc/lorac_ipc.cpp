#include "ntkcl/methods/lorac_ipc/lorac_ipc.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/optim/gradient_clipping.h"
#include "ntkcl/stats/kmeans.h"

namespace ntkcl::methods::lorac_ipc {
namespace {

constexpr const char* kWhere = "lorac-ipc";
constexpr double kHeadDeviation = 0.02;  // of the head's first weights
constexpr int64_t kImportanceWindow = 128;

// (L, g) of a table (types, L), in the tensors' type.
at::Tensor of_group(const at::Tensor& table, const nn::LoraGroup& group) {
  return table.narrow(0, group.first_type, group.types()).t().to(group.down.options());
}

std::string name_of(const nn::LoraGroup& group) {
  return group.first_type == 0 ? "attention" : group.first_type == 4 ? "fc1" : "fc2";
}

}  // namespace

LoracIpc::LoracIpc(Options options, const nn::VisionTransformer& vit, int64_t tasks)
    : options_(std::move(options)),
      vit_(vit),
      lora_(vit, options_.placement == "all",
            options_.lora_depth > 0 ? options_.lora_depth : vit.depth(), options_.rank) {
  mask_ = at::ones({lora_.types(), lora_.blocks()}, at::kDouble);
  for (const nn::LoraGroup& group : lora_.groups()) {
    bank_.push_back(at::zeros({lora_.blocks(), group.types(), tasks, tasks}, vit.options()));
  }
  const int64_t c = vit.width();
  head_ = {at::zeros({0, c}, vit.options()), at::zeros({0}, vit.options()), {}, {}};
  if (trains_norm()) {
    head_.norm_weight = at::ones({c}, vit.options());
    head_.norm_bias = at::zeros({c}, vit.options());
  }
  task_sizes_ = at::zeros({0}, at::kLong);
  class_ids_ = at::zeros({0}, at::kLong);
  clusters_ = {at::zeros({0, options_.alignment_clusters, c}, vit.options()),
               at::zeros({0, options_.alignment_clusters, c}, vit.options())};
}

// ---- Training ----

std::vector<optim::ParameterGroup> LoracIpc::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  training_ = {};
  training_.task = task;
  class_ids_ = at::tensor(task.class_ids, at::kLong);
  if (head_.weight.size(0) < task.n_classes()) {
    initialise_head(task.n_classes(), services.random());
  }
  if (trained_head_weight_.defined()) {
    head_.weight.copy_(trained_head_weight_);
    head_.bias.copy_(trained_head_bias_);
  }
  begin_module(task, services.random());
  if (options_.ipc_threshold > 0) {
    training_.importance.emplace(options_.importance_decay, options_.uncertainty_decay);
  }

  // Only the current module, the old weights and the task's rows of the head move (section 9.5).
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
  head_.weight =
      random.normal({"head.weight"}, {classes, vit_.width()}, vit_.options()) * kHeadDeviation;
  head_.bias = random.uniform({"head.bias"}, {classes}, 0.0, 0.0, vit_.options());
}

void LoracIpc::begin_module(const TaskInfo& task, RandomSource& random) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(options_.rank));
  for (const nn::LoraGroup& group : lora_.groups()) {
    const at::NoGradGuard no_grad;
    training_.penalties.emplace_back(group.old_down.flatten(0, 1));
    training_.unfrozen.push_back(of_group(mask_, group) * options_.lambda);
  }
  lora_.begin([&](int64_t type, int64_t block, at::IntArrayRef sizes) {
    return random.uniform({"lora.down", task.index, 0, type, block}, sizes, -bound, bound,
                          vit_.options());
  });
  lora_.train(current_mask(), mask_);
}

at::Tensor LoracIpc::current_mask() const {
  at::Tensor current = mask_.clone();
  if (options_.k_mask == "query") {  // 12.1
    current[1] = mask_[0];
  }
  return current;
}

bool LoracIpc::measures(const StepInfo& step) const {
  if (!training_.importance || step.pass > 0) {
    return false;
  }
  const bool all = options_.importance_window == 0 && head_.weight.scalar_type() == at::kDouble;
  if (all || step.steps == 0) {
    return true;
  }
  const int64_t window =
      options_.importance_window > 0 ? options_.importance_window : kImportanceWindow;
  return step.step >= step.steps - window;
}

Losses LoracIpc::gradients(const Batch& batch, const StepInfo& step, TaskServices&) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  const bool measure = measures(step);
  at::Tensor probes;
  if (measure) {
    probes = at::zeros(mask_.sizes(), head_.weight.options()).requires_grad_(true);
  }
  const at::Tensor tokens = nn::pass_with_products(vit_, batch.images, lora_.products(probes));
  const at::Tensor feature =
      trains_norm() ? at::layer_norm(tokens.select(1, 0), {vit_.width()}, head_.norm_weight,
                                     head_.norm_bias, nn::kLayerNormEps)
                    : vit_.class_feature(tokens);
  // Classes of other tasks are at minus infinity: as if they were not there.
  const at::Tensor ce =
      at::cross_entropy_loss(at::linear(feature, training_.head_weight, training_.head_bias),
                             batch.labels - training_.task.n_old);
  ce.backward();
  if (measure) {
    // Without a gradient where every matrix is frozen.
    const at::Tensor& importance = probes.grad();
    training_.importance->add(
        (importance.defined() ? importance : probes.detach()).to(at::kDouble));
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
    grad = grad.defined() ? grad.add_(gradient) : gradient;
    total = total + (result.values * unfrozen.ne(0).flatten()).sum();
  }
  return total;
}

// ---- After training ----

std::vector<std::string> LoracIpc::stages(const TaskInfo& task) const {
  std::vector<std::string> stages{"freezing", "statistics"};
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
    bank_[i].select(2, t).narrow(2, 0, t + 1).copy_(lora_.groups()[i].omega);
  }
  if (training_.importance) {
    mask_ = freeze_important(mask_, training_.importance->score(),
                             {.threshold = options_.ipc_threshold,
                              .of_new = options_.new_mask,
                              .rule = options_.selection});
    training_.importance.reset();
  }
  if (trains_norm()) {
    first_ = {};
  }
  recent_ = {};
}

void LoracIpc::gather_statistics(TaskServices& services) {
  const TaskInfo& task = services.task();
  std::vector<at::Tensor> own, first, labels;
  services.for_each_image("statistics", [&](const Batch& batch) {
    own.push_back(features(task.index, batch.images));
    first.push_back(task.first() ? own.back() : features(0, batch.images));
    labels.push_back(batch.labels);
  });
  NTKCL_CHECK(!own.empty(), "data", "task ", task.index,
              ": expected at least one readable training image, got none");
  const at::Tensor own_rows = at::cat(own), first_rows = directions(at::cat(first));
  const at::Tensor all_labels = at::cat(labels);
  const int64_t k = options_.alignment_clusters;
  std::vector<at::Tensor> means, variances;
  for (int64_t c = task.n_old; c < task.n_seen(); ++c) {
    services.progress("clusters", c - task.n_old, task.n_new);
    const at::Tensor rows = all_labels.eq(c).nonzero().squeeze(1);
    NTKCL_CHECK(rows.size(0) > 0, "data", "class ", class_ids_[c].item<int64_t>(),
                ": expected at least one readable training image, got none");
    if (options_.inference != "none") {
      const at::Tensor x = first_rows.index_select(0, rows);
      gaussians_.add_class(x, cluster(x, options_.inference_clusters,
                                      {"inference.clusters", task.index, 0, c}, services.random()));
    }
    if (options_.alignment) {
      const at::Tensor x = own_rows.index_select(0, rows);
      const at::Tensor of =
          cluster(x, k, {"alignment.clusters", task.index, 0, c}, services.random());
      const auto [mean, variance] = cluster_moments(x, of, of.max().item<int64_t>() + 1);
      // Clusters that a small class does not have are never drawn from.
      const auto padded = [&](const at::Tensor& moments) {
        return at::constant_pad_nd(moments, {0, 0, 0, k - moments.size(0)});
      };
      means.push_back(padded(mean));
      variances.push_back(padded(variance));
    }
  }
  if (options_.alignment) {
    clusters_.means = at::cat({clusters_.means.narrow(0, 0, task.n_old), at::stack(means)});
    clusters_.variances =
        at::cat({clusters_.variances.narrow(0, 0, task.n_old), at::stack(variances)});
  }
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
  const stats::Clusters found = stats::kmeans(rows, stats::kmeans_plus_plus(rows, draws));
  NTKCL_CHECK(
      options_.small_clusters != "error" || at::bincount(found.labels).gt(1).all().item<bool>(),
      kWhere, "class ", class_ids_[draw.list].item<int64_t>(),
      ": expected at least two images in each of ", clusters,
      " clusters, got a cluster of one; small_clusters = shrink allows it");
  return found.labels;
}

void LoracIpc::align(TaskServices& services) {
  const TaskInfo& task = services.task();
  services.evaluate("before alignment");
  if (!options_.train_aligned_head) {
    trained_head_weight_ = head_.weight.clone();
    trained_head_bias_ = head_.bias.clone();
  }
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
  align_head(head_, clusters_, task.n_old,
             {.epochs = options_.alignment_epochs,
              .learning_rate = options_.alignment_learning_rate,
              .rows = options_.alignment_draws},
             draws);
}

// ---- Inference ----

const nn::VisionTransformer& LoracIpc::snapshot(int64_t task) const {
  NTKCL_CHECK(0 <= task && task <= last_task(), kWhere, "expected a finished task, got ", task,
              " of ", task_sizes_.size(0));
  Snapshot& kept = task == 0 ? first_ : recent_;
  if (kept.task != task) {
    std::vector<at::Tensor> omega;
    for (const at::Tensor& bank : bank_) {
      omega.push_back(bank.select(2, task).narrow(2, 0, task + 1));
    }
    kept.vit.reset();  // before another takes its place in memory
    kept.vit = vit_.with_weights(lora_.merged(omega));
    if (trains_norm()) {
      kept.vit = kept.vit->with_final_norm(head_.norm_weight, head_.norm_bias);
    }
    kept.task = task;
  }
  return *kept.vit;
}

at::Tensor LoracIpc::features(int64_t task, const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const nn::VisionTransformer& vit = snapshot(task);
  return nn::plain_pass(vit, vit.prefix(images));
}

at::Tensor LoracIpc::directions(const at::Tensor& features) {
  return nn::unit_rows(features);
}

int64_t LoracIpc::n_seen() const {
  return task_sizes_.sum().item<int64_t>();
}

at::Tensor LoracIpc::logits(const at::Tensor& features) const {
  const int64_t classes = options_.mask_unseen || options_.inference == "none"
                              ? n_seen()
                              : head_.weight.size(0);  // 12.3
  return at::linear(features, head_.weight.narrow(0, 0, classes).detach(),
                    head_.bias.narrow(0, 0, classes).detach());
}

at::Tensor LoracIpc::tasks_of(const at::Tensor& classes) const {
  const at::Tensor task_of = at::repeat_interleave(task_sizes_);  // (n_seen)
  const at::Tensor numbers = classes.cpu();
  if (options_.class_lookup == "class") {
    return task_of.index_select(0, numbers);
  }
  // 12.4: a place among the classes seen is taken for the data set's class. One that is not learned
  // yet has the newest snapshot.
  at::Tensor by_id = at::full_like(class_ids_, last_task());
  by_id.index_copy_(0, class_ids_.narrow(0, 0, n_seen()), task_of);
  return by_id.index_select(0, numbers);
}

Scores LoracIpc::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  if (options_.inference == "none") {
    const at::Tensor all = logits(features(last_task(), images));
    return {all, at::repeat_interleave(task_sizes_).index_select(0, all.argmax(1).cpu())};
  }
  const at::Tensor first = features(0, images);
  const at::Tensor tasks = tasks_of(gaussians_.distances(directions(first), 0).argmin(1));
  at::Tensor chosen = first.clone();
  for (const at::Tensor& present : std::get<0>(at::_unique(tasks)).unbind(0)) {
    const auto task = present.item<int64_t>();
    if (task > 0) {
      const at::Tensor rows = tasks.eq(task).nonzero().squeeze(1).to(images.device());
      chosen.index_copy_(0, rows, features(task, images.index_select(0, rows)));
    }
  }
  return {logits(chosen), tasks};
}

void LoracIpc::score(TestImages& images, const ScoresFn& fn) {
  const at::NoGradGuard no_grad;
  if (options_.inference == "none") {  // the last snapshot is another each time
    Method::score(images, fn);
    return;
  }
  if (trains_norm()) {
    seen_.clear();
  }
  images.for_each_batch(seen_.unknown(images.numbers()), [&](const Batch& batch) {
    seen_.add(batch.numbers, batch.labels, features(0, batch.images));
  });
  if (seen_.size() == 0) {
    return;
  }
  seen_.update_nearest(gaussians_.classes(), [&](const at::Tensor& rows, int64_t first) {
    return gaussians_.distances(directions(rows), first);
  });
  at::Tensor tasks = tasks_of(seen_.nearest());
  if (options_.inference == "vote_by_test_task") {
    tasks = votes(tasks, at::repeat_interleave(task_sizes_).index_select(0, seen_.labels().cpu()));
  }
  for (const auto& [task, numbers] : seen_.choose(tasks)) {
    images.for_each_batch(numbers, [&, task = task](const Batch& batch) {
      seen_.set(batch.numbers, features(task, batch.images));
    });
  }
  fn(seen_.labels(), {logits(seen_.features()), tasks});
}

// ---- State ----

void LoracIpc::visit_state(const StateVisitor& visitor) {
  for (size_t i = 0; i < lora_.groups().size(); ++i) {
    nn::LoraGroup& group = lora_.groups()[i];
    const std::string prefix = name_of(group) + ".";
    visitor(prefix + "down", group.down);
    visitor(prefix + "up", group.up);
    visitor(prefix + "old_down", group.old_down);
    visitor(prefix + "old_up", group.old_up);
    visitor(prefix + "omega", group.omega);
    visitor(prefix + "bank", bank_[i]);
  }
  visitor("mask", mask_);
  visitor("head.weight", head_.weight);
  visitor("head.bias", head_.bias);
  if (trains_norm()) {
    visitor("head.norm.weight", head_.norm_weight);
    visitor("head.norm.bias", head_.norm_bias);
  }
  if (trained_head_weight_.defined()) {
    visitor("head.trained.weight", trained_head_weight_);
    visitor("head.trained.bias", trained_head_bias_);
  }
  visitor("task_sizes", task_sizes_);
  visitor("class_ids", class_ids_);
  visitor("alignment.means", clusters_.means);
  visitor("alignment.variances", clusters_.variances);
  gaussians_.visit_state("inference.", vit_.options(), visitor);
  if (training_.importance) {
    training_.importance->visit_state("importance.", visitor);
  }
  check_state();
  first_ = {};
  recent_ = {};
  seen_.clear();
}

// Tensors that came from outside fit each other.
void LoracIpc::check_state() const {
  const auto expect = [](const std::string& name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    NTKCL_CHECK(tensor.sizes() == sizes, "state", name, ": expected ", sizes, ", got ",
                tensor.sizes());
  };
  const int64_t l = lora_.blocks(), r = options_.rank, t = lora_.modules();
  const int64_t classes = head_.weight.dim() == 2 ? head_.weight.size(0) : -1, c = vit_.width();
  for (size_t i = 0; i < lora_.groups().size(); ++i) {
    const nn::LoraGroup& group = lora_.groups()[i];
    const std::string prefix = name_of(group) + ".";
    const int64_t g = group.types(), out = group.pretrained.size(2), in = group.pretrained.size(3);
    const int64_t tasks = bank_[i].dim() == 4 ? bank_[i].size(3) : -1;
    expect(prefix + "down", group.down, {l, g, in, r});
    expect(prefix + "up", group.up, {l, g, r, out});
    expect(prefix + "old_down", group.old_down, {l, g, in, t * r});
    expect(prefix + "old_up", group.old_up, {l, g, t * r, out});
    expect(prefix + "omega", group.omega, {l, g, t});
    expect(prefix + "bank", bank_[i], {l, g, tasks, tasks});
    NTKCL_CHECK(t <= tasks, "state", prefix, "bank: expected ", t, " tasks, got ", tasks);
  }
  expect("mask", mask_, {lora_.types(), l});
  expect("head.weight", head_.weight, {classes, c});
  expect("head.bias", head_.bias, {classes});
  expect("task_sizes", task_sizes_, {t});
  NTKCL_CHECK(t == 0 || (task_sizes_.gt(0).all().item<bool>() && n_seen() <= classes), "state",
              "task_sizes: expected positive numbers of at most ", classes, " classes together");
  NTKCL_CHECK(clusters_.means.dim() == 3 &&
                  clusters_.means.sizes() == clusters_.variances.sizes() &&
                  clusters_.means.size(2) == c,
              "state", "alignment.*: expected means and variances (n, K, ", c, "), got ",
              clusters_.means.sizes(), " and ", clusters_.variances.sizes());
}

}  // namespace ntkcl::methods::lorac_ipc
