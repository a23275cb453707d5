#include "ntkcl/methods/ntk_cl/ntk_cl.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/methods/dropout.h"
#include "ntkcl/methods/gathering.h"
#include "ntkcl/methods/ntk_cl/losses.h"
#include "ntkcl/methods/peft.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/ops/dissimilarity.h"
#include "ntkcl/ops/projection.h"
#include "ntkcl/ops/section_cosine.h"
#include "ntkcl/optim/running_mean.h"
#include "ntkcl/stats/drift.h"
#include "ntkcl/stats/prototypes.h"

namespace ntkcl::methods::ntk_cl {
namespace {

void append(std::vector<at::Tensor>& to, const std::vector<at::Tensor>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

double inverse_root(int64_t n) {
  return 1.0 / std::sqrt(static_cast<double>(n));
}

}  // namespace

std::vector<at::Tensor> Lists::tensors() const {
  std::vector<at::Tensor> all = channel.tensors();
  append(all, patch.tensors());
  return all;
}

int64_t list_in_use(int64_t frozen_lists, int64_t task, int64_t tasks) {
  NTKCL_CHECK(1 <= frozen_lists && frozen_lists <= tasks, "ntk-cl",
              "'frozen_lists': expected 1 to the number of tasks (", tasks, "), got ",
              frozen_lists);
  return std::max<int64_t>(1, frozen_lists - task / (tasks / frozen_lists));
}

NtkCl::NtkCl(Options options, const nn::VisionTransformer& vit, int64_t tasks, RandomSource& random)
    : options_(std::move(options)), vit_(vit) {
  const int64_t k = options_.frozen_lists, c = vit.width();
  list_in_use(k, 0, tasks);  // refuses K > T
  initialise(current_, 0, random);
  frozen_.resize(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    initialise(frozen_[static_cast<size_t>(i)], i + 1, random);
  }
  tasks_in_list_ = at::zeros({k}, at::kLong);

  const int64_t width = sections() * c;
  if (fuses()) {
    fusion_.emplace(options_.fusion, width, c, options_.fusion_heads, vit.options());
    int64_t number = 0;
    for (nn::Fusion::Parameter& p : fusion_->parameters()) {
      const Draw draw{"fusion", 0, 0, number++, 0};
      p.value = p.bound < 0
                    ? random.normal(draw, p.value.sizes(), vit.options())
                    : random.uniform(draw, p.value.sizes(), -p.bound, p.bound, vit.options());
    }
    constants_.previous = copied_weights();
  }
  head_weight_ = at::zeros({0, width}, vit.options());
  head_sigma_ = at::full({1}, options_.head_sigma_init, vit.options());
  prototypes_ = at::zeros({0, width}, vit.options());
  before_ = at::zeros({0, width}, vit.options());
  aligned_ = at::zeros({0, width}, vit.options());
  if (options_.alignment.on) {
    gaussians_.emplace(width, vit.options());
  }
  std::vector<double> multipliers;
  if (options_.pretrained_feature) {
    multipliers.push_back(options_.beta);
  }
  multipliers.insert(multipliers.end(), static_cast<size_t>(k), options_.gamma);
  multipliers.push_back(options_.alpha);
  multipliers_ = at::tensor(multipliers, at::kDouble).to(vit.options());
}

int64_t NtkCl::sections() const {
  return options_.frozen_lists + 1 + (options_.pretrained_feature ? 1 : 0);
}

void NtkCl::initialise(Lists& lists, int64_t number, RandomSource& random) {
  const int64_t prompts = options_.prompt_tokens;
  lists.channel = fresh_adapters(vit_, options_.rank, {"adapter.down", 0, 0, number}, random);
  lists.patch = options_.prompts == "gated"  // section 8.1
                    ? fresh_prompts(vit_, prompts, {"prompts.mix", 0, 0, number}, random)
                    : nn::PromptList::zeros(vit_.depth(), prompts, vit_.tokens(), vit_.width(),
                                            vit_.options());
}

// ---- Features ----

Features NtkCl::forward(const Batch& batch, const Noise* noise) const {
  const nn::Prefix prefix = vit_.prefix(batch.images);
  at::Tensor plain;
  if (options_.pretrained_feature) {
    const at::NoGradGuard no_grad;
    plain = nn::plain_pass(vit_, prefix);
  }
  Features features;
  if (uses_channel()) {
    features.channel = batch.whole(channel_features(prefix, plain, noise));
  }
  if (uses_patch()) {
    features.patch = batch.whole(patch_features(prefix, plain));
  }
  if (fuses()) {
    at::Tensor mask;
    if (noise && options_.fusion_dropout > 0 && fusion_->drops_heads()) {
      mask = noise->random.keep_mask({"fusion.dropout", noise->task, noise->step},
                                     {features.channel.size(0), fusion_->heads()},
                                     options_.fusion_dropout, vit_.options().device());
    }
    features.fused = (*fusion_)(features.channel, features.patch, mask, options_.fusion_dropout);
  }
  return features;
}

at::Tensor NtkCl::channel_features(const nn::Prefix& prefix, const at::Tensor& plain,
                                   const Noise* noise) const {
  std::vector<at::Tensor> parts;
  if (plain.defined()) {
    parts.push_back(plain);
  }
  for (int64_t i = options_.frozen_lists; i >= 1; --i) {
    const at::NoGradGuard no_grad;
    // Dropout is active in the frozen passes too (section 2).
    parts.push_back(nn::channel_pass(vit_, prefix, frozen_[static_cast<size_t>(i - 1)].channel,
                                     options_.channel_scale, adapter_dropout(noise, i)));
  }
  parts.push_back(nn::channel_pass(vit_, prefix, current_.channel, options_.channel_scale,
                                   adapter_dropout(noise, 0)));
  return at::cat(parts, 1);
}

at::Tensor NtkCl::patch_features(const nn::Prefix& prefix, const at::Tensor& plain) const {
  std::vector<at::Tensor> parts;
  if (plain.defined()) {
    parts.push_back(plain);
  }
  for (int64_t i = options_.frozen_lists; i >= 1; --i) {
    const at::NoGradGuard no_grad;
    parts.push_back(nn::patch_pass(vit_, prefix, frozen_[static_cast<size_t>(i - 1)].patch,
                                   options_.prompt_scale));
  }
  parts.push_back(nn::patch_pass(vit_, prefix, current_.patch, options_.prompt_scale));
  return at::cat(parts, 1);
}

std::vector<nn::Dropout> NtkCl::adapter_dropout(const Noise* noise, int64_t list) const {
  std::vector<nn::Dropout> dropout;
  if (!noise || options_.adapter_dropout == 0) {
    return dropout;
  }
  for (int64_t l = 0; l < vit_.depth(); ++l) {
    const Draw draw{"adapter.dropout", noise->task, noise->step, list, l};
    dropout.push_back(dropout_of(draw, options_.adapter_dropout, noise->random, noise->rows, 0));
  }
  return dropout;
}

Features NtkCl::features(const Batch& batch) const {
  const at::NoGradGuard no_grad;
  return forward(batch, nullptr);
}

const at::Tensor& NtkCl::scored(const Features& features) const {
  return fuses() ? features.fused : uses_channel() ? features.channel : features.patch;
}

Scores NtkCl::scores(const at::Tensor& images) const {
  return {ops::section_cosine(scored(features(images)), class_weights(), multipliers_)};
}

at::Tensor NtkCl::all_features(const std::string& activity, TaskServices& services) const {
  std::vector<at::Tensor> parts;
  services.for_each_image(activity,
                          [&](const Batch& batch) { parts.push_back(scored(features(batch))); });
  return gathered(parts, services.task());
}

// ---- Training ----

std::vector<at::Tensor> NtkCl::peft_parameters() const {
  std::vector<at::Tensor> all;
  if (uses_channel()) {
    append(all, current_.channel.tensors());
  }
  if (uses_patch()) {
    append(all, current_.patch.tensors());
  }
  if (fuses()) {
    for (const nn::Fusion::Parameter& p : fusion_->parameters()) {
      all.push_back(p.value);
    }
  }
  return all;
}

std::vector<std::pair<std::string, at::Tensor>> NtkCl::regularised() const {
  std::vector<std::pair<std::string, at::Tensor>> weights{
      {"channel.down.weight", current_.channel.down_weight},
      {"channel.up.weight", current_.channel.up_weight},
      {"patch.mix.weight", current_.patch.mix_weight},
      {"patch.norm.weight", current_.patch.norm_weight}};
  for (const nn::Fusion::Parameter& p : fusion_->parameters()) {
    if (p.weight) {
      weights.emplace_back("fusion." + p.name, p.value);
    }
  }
  return weights;
}

std::vector<std::pair<std::string, at::Tensor>> NtkCl::copied_weights() const {
  auto weights = regularised();
  for (auto& [name, weight] : weights) {
    weight = weight.detach().clone();
  }
  return weights;
}

void NtkCl::before_task(TaskServices& services) {
  const TaskInfo& task = services.task();
  before_ = at::zeros({0, prototypes_.size(1)}, vit_.options());
  const int64_t width = sections() * vit_.width();
  head_weight_ =
      services.random().uniform({"head.weight", task.index}, {task.n_new, width},
                                -inverse_root(width), inverse_root(width), vit_.options());
  head_sigma_ = at::full({1}, options_.head_sigma_init, vit_.options());
  if (fuses()) {
    constants_.previous = copied_weights();
  }
  // With K > 1 the features move even without training: another frozen list is written.
  const bool moves = trains(task) || options_.frozen_lists > 1;
  if (!task.first() && (options_.drift_compensation || options_.drift != "off") && moves) {
    before_ = all_features("features before training", services);
  }
}

std::vector<optim::ParameterGroup> NtkCl::trained(const TaskInfo& task) {
  constants_.info = task;
  if (!trains(task)) {
    return {};
  }
  if (fuses()) {
    constants_.orth = orth_constant();
  }
  const double scale = task.first() ? 1.0 : options_.later_lr_factor;
  std::vector<at::Tensor> decaying = peft_parameters();
  decaying.push_back(head_weight_);
  std::vector<optim::ParameterGroup> groups{
      {.name = "peft", .parameters = std::move(decaying), .learning_rate_scale = scale},
      {.name = "head.sigma",
       .parameters = {head_sigma_},
       .learning_rate_scale = scale,
       .decays = options_.head_sigma_decays}};
  for (const optim::ParameterGroup& group : groups) {
    for (const at::Tensor& parameter : group.parameters) {
      parameter.requires_grad_(true);
    }
  }
  return groups;
}

at::Tensor NtkCl::orth_constant() const {
  const at::Tensor old = prototypes_.narrow(0, 0, constants_.info.n_old);
  if (options_.orth == "signed_sum") {
    return signed_direction(old_basis(old, options_.orth_rank));
  }
  const int64_t c = vit_.width();
  return old_basis(old.narrow(1, old.size(1) - c, c), options_.orth_rank);
}

Losses NtkCl::gradients(const Batch& batch, const StepInfo& step, TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  const Noise noise{services.random(), constants_.info.index, step.step, batch.rows};
  const Features features = forward(batch, &noise);
  const at::Tensor labels = batch.labels - constants_.info.n_old;
  Losses losses;
  at::Tensor total = at::zeros({}, vit_.options());
  const auto add = [&](const char* name, const at::Tensor& value, double weight) {
    losses.emplace_back(name, value.detach());
    total = total + weight * value;
  };
  // L = CE(F_c) + CE(F_p) + CE(F_m) + eta L_dis + upsilon L_orth + lambda L_reg    (section 5)
  if (uses_channel()) {
    add("ce_channel", cross_entropy(features.channel, labels), 1.0);
  }
  if (uses_patch()) {
    add("ce_patch", cross_entropy(features.patch, labels), 1.0);
  }
  if (fuses()) {
    add("ce_fused", cross_entropy(features.fused, labels), 1.0);
    add("l_dis", dissimilarity_loss(features, batch, step, services.random()), options_.eta);
    add("l_orth", orthogonality_loss(features), options_.upsilon);
  }
  total.backward();
  services.average_gradients({});
  if (fuses()) {
    const at::Tensor reg = regularise();
    losses.emplace_back("l_reg", reg);
    total = total + options_.lambda * reg;
  }
  losses.emplace_back("total", total.detach());
  return losses;
}

at::Tensor NtkCl::cross_entropy(const at::Tensor& features, const at::Tensor& labels) const {
  return at::cross_entropy_loss(nn::cosine_logits(features, head_weight_, head_sigma_), labels);
}

at::Tensor NtkCl::dissimilarity_loss(const Features& features, const Batch& batch,
                                     const StepInfo& step, RandomSource& random) const {
  const TaskInfo& task = constants_.info;
  // The release takes all rows but the last `increment` as old, which differs where the first task
  // is larger than the increment: all-zero rows with labels 0, 1, ... take part (section 5).
  const bool quirk = options_.dissimilarity == "release" && task.first();
  const int64_t old = quirk ? std::max<int64_t>(0, task.n_new - task.increment) : task.n_old;
  const at::Tensor rows = quirk ? prototypes_.new_zeros({old, prototypes_.size(1)}) : prototypes_;
  const int64_t count = std::min(task.batch_size, old);
  const at::Tensor drawn = random.placed(
      {"old_prototypes", task.index, step.step}, batch.labels.device(),
      [=](RandomSource& source, const Draw& draw) { return source.choice(draw, old, count); });
  return ops::dissimilarity(features.fused, batch.labels, rows.index_select(0, drawn), drawn,
                            options_.dissimilarity, options_.temperature)
      .loss;
}

at::Tensor NtkCl::orthogonality_loss(const Features& features) const {
  if (options_.orth == "signed_sum") {
    return ops::signed_projection(features.channel, constants_.orth) +
           ops::signed_projection(features.patch, constants_.orth);
  }
  const auto current = [&](const at::Tensor& f) {
    return f.narrow(1, f.size(1) - vit_.width(), vit_.width());
  };
  return ops::projection_energy(current(features.channel), constants_.orth) +
         ops::projection_energy(current(features.patch), constants_.orth);
}

at::Tensor NtkCl::regularise() const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> weights, previous;
  for (const auto& [name, weight] : regularised()) {
    weights.push_back(weight);
  }
  for (const auto& [name, weight] : constants_.previous) {
    previous.push_back(weight);
  }
  // d/dW |W - W_prev|^2 = 2 (W - W_prev): added straight to the gradients.
  const std::vector<at::Tensor> moved = at::_foreach_sub(weights, previous);
  for (size_t i = 0; i < weights.size(); ++i) {
    at::Tensor& grad = weights[i].mutable_grad();
    grad = grad.defined() ? grad.add_(moved[i], 2.0 * options_.lambda)
                          : moved[i] * (2.0 * options_.lambda);
  }
  return at::stack(at::_foreach_norm(moved)).square().sum();
}

// ---- After training ----

std::vector<std::string> NtkCl::stages(const TaskInfo& task) const {
  // The EMA comes before the prototypes of the task are computed (section 2).
  std::vector<std::string> stages{"prototypes"};
  if (!task.last()) {
    stages.insert(stages.begin(), "ema");
  }
  if (options_.alignment.on && !task.first()) {
    stages.emplace_back("alignment");
  }
  return stages;
}

void NtkCl::run_stage(const std::string& stage, TaskServices& services) {
  const at::NoGradGuard no_grad;
  if (stage == "ema") {
    update_frozen_list(services.task());
  } else if (stage == "prototypes") {
    update_prototypes(services);
  } else {
    align(services);
  }
}

void NtkCl::update_frozen_list(const TaskInfo& task) {
  // The frozen list in use becomes the running mean pre <- n/(n+1) pre + 1/(n+1) cur, with n = t as
  // released, or the number of tasks already in that list (section 8.6).
  const int64_t index = list_in_use(options_.frozen_lists, task.index, task.count) - 1;
  const int64_t in_list = tasks_in_list_[index].item<int64_t>();
  const int64_t n = options_.ema_count == "task" ? task.index : in_list;
  std::vector<at::Tensor> mean = frozen_[static_cast<size_t>(index)].tensors();
  optim::running_mean_(mean, current_.tensors(), n);
  tasks_in_list_[index] = in_list + 1;
}

void NtkCl::update_prototypes(TaskServices& services) {
  const TaskInfo& task = services.task();
  stats::ClassMeans means(task.n_old, task.n_new, prototypes_.size(1));
  std::vector<at::Tensor> rows, labels;
  const bool keep = before_.size(0) > 0 || gaussians_;
  services.for_each_image("prototypes", [&](const Batch& batch) {
    const at::Tensor f = scored(features(batch));
    means.add(f, batch.labels);
    if (keep) {
      rows.push_back(f);
      labels.push_back(batch.labels);
    }
  });
  const at::Tensor fresh = means.result(prototypes_.scalar_type());
  at::Tensor old = prototypes_.narrow(0, 0, task.n_old);
  if (gaussians_) {
    gaussians_->keep(task.n_old);
  }
  if (before_.size(0) > 0) {
    const at::Tensor shift = drift(at::cat(rows));
    old = old + shift;
    if (gaussians_) {
      gaussians_->move(shift);
    }
    before_ = at::zeros({0, prototypes_.size(1)}, vit_.options());
  }
  prototypes_ = at::cat({old, fresh});
  if (gaussians_) {
    const at::Tensor all = at::cat(rows), of = at::cat(labels);
    for (int64_t c = task.n_old; c < task.n_seen(); ++c) {
      gaussians_->add_class(all.index_select(0, of.eq(c).nonzero().squeeze(1)),
                            options_.alignment.covariance_eps);
    }
    // From the means as they have drifted; of unit length, as their own would damp every step.
    aligned_ = nn::unit_rows(prototypes_.view({-1, vit_.width()})).view_as(prototypes_);
  }
}

at::Tensor NtkCl::drift(const at::Tensor& after) const {
  const at::Tensor old = prototypes_.narrow(0, 0, constants_.info.n_old);
  return options_.drift == "paired"
             ? stats::gaussian_drift(before_, after, old, options_.sigma)
             : stats::section_drift(before_, after, old, vit_.width(), options_.drift_tau);
}

void NtkCl::align(TaskServices& services) {
  const TaskInfo& task = services.task();
  services.evaluate("before alignment");
  const double scale = options_.alignment_logit_scale / multipliers_.sum().item<double>();
  const at::Tensor aligned = aligned_.clone();  // a repeated stage begins from aligned_ again
  align_on_gaussians(
      {aligned},
      [&](const at::Tensor& x) { return ops::section_cosine(x, aligned, multipliers_) * scale; },
      *gaussians_,
      mean_factors(task.tasks_of_classes(), task.index, options_.alignment.lowest_mean),
      options_.alignment, gaussian_draws(services, *gaussians_, options_.alignment));
  aligned_ = aligned;
}

void NtkCl::visit_state(const StateVisitor& visitor) {
  const auto lists = [&](Lists& l, const std::string& prefix) {
    l.channel.visit(prefix + "channel.", visitor);
    l.patch.visit(prefix + "patch.", visitor);
  };
  lists(current_, "");
  for (size_t i = 0; i < frozen_.size(); ++i) {
    lists(frozen_[i], "pre" + std::to_string(i + 1) + ".");
  }
  if (fusion_) {
    for (nn::Fusion::Parameter& p : fusion_->parameters()) {
      at::Tensor value = p.value.detach();
      visitor("fusion." + p.name, value);
      NTKCL_CHECK(value.sizes() == p.value.sizes(), "state", "fusion.", p.name, ": expected ",
                  p.value.sizes(), ", got ", value.sizes());
    }
  }
  visitor("head.weight", head_weight_);
  visitor("head.sigma", head_sigma_);
  visitor("prototypes", prototypes_);
  visitor("features_before", before_);
  visitor("aligned", aligned_);
  if (gaussians_) {
    gaussians_->visit_state("gaussians.", visitor);
  }
  visitor("tasks_in_list", tasks_in_list_);
  for (auto& [name, weight] : constants_.previous) {
    visitor("previous." + name, weight);
  }
  check_state();
}

// Tensors that came from outside fit each other.
void NtkCl::check_state() const {
  const int64_t width = sections() * vit_.width();
  const auto expect_rows = [&](const char* name, const at::Tensor& rows) {
    NTKCL_CHECK(rows.dim() == 2 && rows.size(1) == width, "state", name, ": expected (n, ", width,
                "), got ", rows.sizes());
  };
  expect_rows("head.weight", head_weight_);
  expect_rows("prototypes", prototypes_);
  expect_rows("features_before", before_);
  expect_rows("aligned", aligned_);
  NTKCL_CHECK(head_sigma_.sizes() == at::IntArrayRef({1}), "state",
              "head.sigma: expected one number, got ", head_sigma_.sizes());
  NTKCL_CHECK(!options_.alignment.on || aligned_.sizes() == prototypes_.sizes(), "state",
              "aligned: expected ", prototypes_.sizes(), ", got ", aligned_.sizes());
  NTKCL_CHECK(tasks_in_list_.sizes() == at::IntArrayRef({options_.frozen_lists}) &&
                  tasks_in_list_.ge(0).all().item<bool>(),
              "state", "tasks_in_list: expected ", options_.frozen_lists, " counts of tasks, got ",
              tasks_in_list_.sizes());
  if (fuses()) {
    const auto weights = regularised();
    for (size_t i = 0; i < constants_.previous.size(); ++i) {
      const auto& [name, weight] = constants_.previous[i];
      NTKCL_CHECK(weight.sizes() == weights[i].second.sizes(), "state", "previous.", name,
                  ": expected ", weights[i].second.sizes(), ", got ", weight.sizes());
    }
  }
}

}  // namespace ntkcl::methods::ntk_cl
