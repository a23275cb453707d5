#include "ntkcl/train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ntkcl/core/error.h"
#include "ntkcl/scenario/task_split.h"
#include "ntkcl/train/compute_setup.h"
#include "ntkcl/train/nearest_mean.h"

namespace ntkcl::train {
Trainer::Trainer(const methods::MakeMethod& make, TrainOptions options,
                 const nn::VisionTransformer& backbone, const RunData& data,
                 std::unique_ptr<methods::RandomSource> random,
                 std::shared_ptr<dist::Communicator> ranks)
    : options_(std::move(options)),
      device_(resolve_device(options_.device)),
      vit_(prepare_backbone(backbone, options_)),
      class_order_(data.class_order),
      ranks_(std::move(ranks)),
      images_(ImageSet::of_run(data, options_.validation_fraction, vit_.options(), ranks_)),
      random_(std::move(random)) {
  const auto classes = static_cast<int64_t>(class_order_.size());
  task_sizes_ = data.task_sizes;
  if (task_sizes_.empty()) {
    task_sizes_ = scenario::split_classes(classes, options_.initial_classes, options_.increment);
  }
  NTKCL_CHECK(std::accumulate(task_sizes_.begin(), task_sizes_.end(), int64_t{0}) == classes,
              "train", "expected tasks of all ", classes, " classes, got sizes ",
              at::IntArrayRef(task_sizes_));
  if (!random_) {
    random_ = std::make_unique<methods::RandomSource>(static_cast<uint64_t>(options_.seed));
  }
  NTKCL_CHECK(data.transform.image_size == vit_.image_size(), "image_size",
              "expected the backbone's ", vit_.image_size(), ", got ", data.transform.image_size);
  for (const double rate : {options_.learning_rate, options_.initial_learning_rate}) {
    const bool used = rate > 0 || rate == options_.learning_rate;
    NTKCL_CHECK(
        !used || options_.schedule.kind != "cosine" || options_.schedule.min_learning_rate <= rate,
        "train", "'min_learning_rate': expected at most the learning rate ", rate, ", got ",
        options_.schedule.min_learning_rate);
  }
  info_.count = static_cast<int64_t>(task_sizes_.size());
  for (const int64_t size : {options_.batch_size, options_.evaluation_batch_size}) {
    NTKCL_CHECK(size >= ranks_->size(), "ranks",
                "'batch_size', 'evaluation_batch_size': expected an image for each of ",
                ranks_->size(), " ranks at least, got ", size);
  }
  method_ = make(vit_, info_.count, *random_);
}

Trainer::~Trainer() = default;

void Trainer::begin_after(int64_t tasks, const methods::State& learned) {
  NTKCL_CHECK(!started_ && 0 < tasks && tasks < info_.count, "train", "expected 1 to ",
              info_.count - 1, " tasks learned before a new run, got ", tasks);
  methods::load_state(methods::visit_of(*method_), learned, {});
  for (int64_t t = tasks; t < info_.count; ++t) {
    const methods::ClassRange classes = method_->trains_on(info_of(t));
    for (int64_t c = classes.first; c < classes.first + classes.count; ++c) {
      NTKCL_CHECK(!images_.first.of_classes(c, 1).empty(), "train", "class ",
                  class_order_[static_cast<size_t>(c)],
                  ": expected its training images, which this method reads again in every later "
                  "task, got none");
    }
  }
  progress_.task = tasks;
  for (int64_t t = 0; t < tasks; ++t) {
    evaluations_.emplace_back(task_sizes_, t);
  }
}

RunResult Trainer::run(const Hooks& hooks, const std::optional<Checkpoint>& from) {
  NTKCL_CHECK(!started_, "train", "expected a new trainer: this one has run already");
  started_ = true;
  const ComputeScope scope(options_, device_);
  hooks_ = hooks;
  try {
    if (from) {
      restore(*from);
    }
    return run_tasks();
  } catch (const Interrupted&) {
    throw;
  } catch (const NumericalError&) {
    throw;
  } catch (...) {
    ranks_->leave();
    try {
      report_steps(/*kept=*/0);        // what was done before
    } catch (const std::exception&) {  // the first error is what counts
    }
    throw;
  }
}

RunResult Trainer::run_tasks() {
  begun_with_ = progress_;
  int64_t steps = 0, done = progress_.step;
  for (int64_t t = 0; t < info_.count; ++t) {
    steps += steps_of(t);
    done += t < progress_.task ? steps_of(t) : 0;
  }
  if (resumed_) {
    emit("resume", {{"tasks", info_.count},
                    {"task_sizes", task_sizes_},
                    {"steps", steps},
                    {"steps_done", done},
                    {"task", progress_.task},
                    {"step", progress_.step}});
  } else {
    emit("run_begin", {{"tasks", info_.count}, {"task_sizes", task_sizes_}, {"steps", steps}});
  }
  while (progress_.task < info_.count) {
    info_ = info_of(progress_.task);
    run_task();
  }
  RunResult result;
  result.summary = stats::summarize(evaluations_);
  result.evaluations = std::move(evaluations_);
  result.task_sizes = task_sizes_;
  result.seconds = begun_with_.seconds + watch_.seconds();
  result.training_seconds = progress_.training_seconds;
  result.training_images = progress_.training_images;
  result.trainable_parameters = progress_.trainable_parameters;
  method_->visit_state(
      [&](const std::string&, at::Tensor& tensor) { result.stored_parameters += tensor.numel(); });
  const std::vector<double>& gains = progress_.forward_transfer;
  if (!gains.empty()) {
    result.forward_transfer =
        std::accumulate(gains.begin(), gains.end(), 0.0) / static_cast<double>(gains.size());
  }
  result.skipped_images = images_.first.skipped().numel() + images_.second.skipped().numel();
  return result;
}

methods::TaskInfo Trainer::info_of(int64_t task) const {
  const auto first = task_sizes_.begin();
  return {.index = task,
          .count = static_cast<int64_t>(task_sizes_.size()),
          .n_old = std::accumulate(first, first + task, int64_t{0}),
          .n_new = task_sizes_[static_cast<size_t>(task)],
          .increment = options_.increment,
          .batch_size = options_.batch_size,
          .class_ids = class_order_,
          .sizes = task_sizes_};
}

void Trainer::run_task() {
  const Stopwatch watch;
  if (!progress_.begun) {
    if (options_.forward_transfer && !info_.first()) {
      measure_forward_transfer();
    }
    method_->before_task(*this);
    share_state();
    progress_.begun = true;
    const auto first = class_order_.begin() + info_.n_old;
    const auto images = images_of(info_).size();
    emit("task_begin", {{"task", info_.index},
                        {"classes", std::vector<int64_t>(first, first + info_.n_new)},
                        {"train_images", static_cast<int64_t>(images)},
                        {"steps", steps_of(info_.index)}});
    begin_training();
  }
  if (optimizer_) {
    train_task();
    replay_.reset();
    optimizer_.reset();
  }
  for (const std::string& stage : method_->stages(info_)) {
    check_stop();
    try {
      method_->run_stage(stage, *this);
      share_state();
    } catch (const NumericalError& error) {  // what the last step left is not finite
      NTKCL_FAIL(NumericalError, "train", "after step ", progress_.step - 1, " of task ",
                 info_.index, ": ", error.what());
    }
  }
  evaluations_.push_back(evaluate_and_report("evaluation", "evaluation", {}));
  emit("task_end", {{"task", info_.index}, {"seconds", watch.seconds()}});
  progress_.task += 1;
  progress_.begun = false;
  progress_.epoch = progress_.step = 0;
  save();
}

// ---- Training ----

void Trainer::check_states_fit() {
  std::string tensors;
  method_->visit_state([&](const std::string& name, at::Tensor& tensor) {
    tensors += name + " " + tensor.toString() + " " + c10::str(tensor.sizes()) + "\n";
  });
  const auto digest = static_cast<int64_t>(std::hash<std::string>()(tensors));
  const auto of_ranks = ranks_->gather(at::full({1}, digest, at::kLong));
  for (size_t rank = 1; rank < of_ranks.size(); ++rank) {
    NTKCL_CHECK(at::equal(of_ranks[rank], of_ranks[0]), "ranks", "rank ", rank,
                " has learned tensors of other names, types or sizes than rank 0 in task ",
                info_.index, ": expected the same images and draws on every rank; here are\n",
                tensors);
  }
}

void Trainer::share_state() {
  if (ranks_->size() == 1) {
    return;
  }
  check_states_fit();
  const at::NoGradGuard no_grad;
  method_->visit_state([&](const std::string&, at::Tensor& tensor) {
    if (tensor.numel() == 0) {
      return;
    }
    at::Tensor of_first = tensor.detach().clone(at::MemoryFormat::Contiguous);
    ranks_->broadcast_(of_first);
    if (!at::equal(tensor, of_first)) {  // what did not change is not written: caches stay
      tensor.detach().copy_(of_first);
    }
  });
}

int64_t Trainer::epochs_of(int64_t task) const {
  return task == 0 && options_.initial_epochs > 0 ? options_.initial_epochs : options_.epochs;
}

int64_t Trainer::steps_of(int64_t task) const {
  const methods::TaskInfo info = info_of(task);
  if (!method_->trains(info)) {
    return 0;
  }
  const auto images = static_cast<int64_t>(images_of(info).size());
  return epochs_of(task) * ((images + options_.batch_size - 1) / options_.batch_size);
}

std::vector<int64_t> Trainer::images_of(const methods::TaskInfo& info) const {
  const methods::ClassRange classes = method_->trains_on(info);
  return images_.first.of_classes(classes.first, classes.count);
}

void Trainer::begin_training() {
  task_steps_ = steps_of(info_.index);
  auto groups = method_->trained(info_);
  int64_t trained = 0;
  for (const optim::ParameterGroup& group : groups) {
    for (const at::Tensor& parameter : group.parameters) {
      trained += parameter.numel();
    }
  }
  progress_.trainable_parameters = std::max(progress_.trainable_parameters, trained);
  optimizer_ = groups.empty() ? nullptr : optim::make_optimizer(options_.optimizer, groups);
  replay_.reset();
  const bool repeats = method_->repeats({.step = 1});  // the first may differ
  if (optimizer_ && options_.cuda_graph && ranks_->size() == 1 && repeats) {
    replay_ = std::make_unique<StepReplay>(
        *method_, *random_, optimizer_->groups(), options_.batch_size, vit_.options().device(),
        [this](const methods::Batch& batch, const methods::StepInfo& step) {
          return method_->gradients(batch, step, *this);
        });
  }
}

void Trainer::train_task() {
  const int64_t epochs = epochs_of(info_.index);
  const bool own = info_.first() && options_.initial_learning_rate > 0;
  const double first_rate = own ? options_.initial_learning_rate : options_.learning_rate;
  while (progress_.epoch < epochs) {
    const double rate = optim::schedule_learning_rates(*optimizer_, options_.schedule, first_rate,
                                                       progress_.epoch, epochs);
    train_epoch(epochs, rate);
    progress_.epoch += 1;
    progress_.position = progress_.epoch_images = 0;
    progress_.epoch_losses.clear();
    pause(/*save_anyway=*/progress_.epoch == epochs);
  }
}

void Trainer::train_epoch(int64_t epochs, double learning_rate) {
  const double before = progress_.training_seconds;
  Stopwatch since_pause;
  const int64_t epoch = progress_.epoch, begun_at = progress_.epoch_images;
  // What is behind a resumed epoch is not read again.
  std::vector<int64_t> images = shuffled_images(images_of(info_), {"order", info_.index, epoch});
  const int64_t start = std::min(progress_.position, static_cast<int64_t>(images.size()));
  images.erase(images.begin(), images.begin() + start);
  const auto left = static_cast<int64_t>(images.size());
  ImageSet& set = images_.first;
  set.start(data::View::kAugmented, std::move(images), options_.batch_size,
            random_->key({"augmentation", info_.index, epoch}));
  methods::Batch batch;
  while (set.next(batch)) {
    train_step(batch, learning_rate);
    progress_.position = start + set.position();
    progress_.training_seconds += since_pause.seconds();
    if (set.position() < left) {
      pause(/*save_anyway=*/false);
    }
    since_pause = {};  // training does not pay for checkpoints
  }
  report_all_steps();
  const int64_t seen = progress_.epoch_images;
  const double seconds = progress_.training_seconds - before;
  std::map<std::string, double> means = progress_.epoch_losses;
  for (auto& [name, value] : means) {
    value /= static_cast<double>(std::max<int64_t>(seen, 1));
  }
  emit("epoch",
       {{"task", info_.index},
        {"epoch", epoch},
        {"epochs", epochs},
        {"learning_rate", learning_rate},
        {"losses", means},
        {"seconds", seconds},
        {"images_per_second", seconds > 0 ? static_cast<double>(seen - begun_at) / seconds : 0.0}});
}

void Trainer::train_step(const methods::Batch& batch, double learning_rate) {
  // The host waits for no step on CUDA: its losses are read when the next one has been started.
  // Several ranks must all know at the same place that a loss is not finite.
  const bool waits = ranks_->size() > 1 || (device_.is_cpu() && !replay_);
  Step told{.epoch = progress_.epoch,
            .step = progress_.step,
            .images = batch.labels.size(0),
            .learning_rate = learning_rate};
  optimizer_->step([&](int pass) {
    const methods::StepInfo step{.step = progress_.step,
                                 .pass = pass,
                                 .passes = optimizer_->passes(),
                                 .steps = task_steps_,
                                 .epoch_steps = task_steps_ / epochs_of(info_.index)};
    told.losses.emplace_back(gradients(batch, step));
    if (waits) {  // checked before the optimiser moves anything
      finite(told, told.losses.back());
    }
  });
  progress_.step += 1;
  progress_.epoch_images += told.images;
  progress_.training_images += told.images;
  steps_since_saved_ += 1;
  unreported_.push_back(std::move(told));
  report_steps(/*kept=*/waits ? 0 : 1);
}

methods::Losses Trainer::gradients(const methods::Batch& batch, const methods::StepInfo& step) {
  return replay_ ? replay_->gradients(batch, step) : method_->gradients(batch, step, *this);
}

void Trainer::report_steps(size_t kept) {
  while (unreported_.size() > kept) {
    const Step step = std::move(unreported_.front());
    unreported_.pop_front();
    report(step);
  }
}

void Trainer::report_all_steps() {
  const Stopwatch watch;
  report_steps(/*kept=*/0);
  progress_.training_seconds += watch.seconds();
}

void Trainer::report(const Step& step) {
  std::map<std::string, double> losses;
  for (size_t pass = step.losses.size(); pass-- > 0;) {
    losses = finite(step, step.losses[pass]);  // the first pass's are told
  }
  emit("step", {{"task", info_.index},
                {"epoch", step.epoch},
                {"step", step.step},
                {"steps", task_steps_},
                {"images", step.images},
                {"learning_rate", step.learning_rate},
                {"losses", losses}});
  for (const auto& [name, value] : losses) {
    progress_.epoch_losses[name] += value * static_cast<double>(step.images);
  }
}

std::map<std::string, double> Trainer::finite(const Step& step, const PendingLosses& losses) const {
  auto values = losses.values();
  for (const auto& [name, value] : values) {
    if (!std::isfinite(value)) {
      NTKCL_FAIL(NumericalError, "train", "the loss '", name, "' is ", value, " at step ",
                 step.step, " of task ", info_.index, " (epoch ", step.epoch,
                 "); a smaller learning rate than ", step.learning_rate, " may help");
    }
  }
  return values;
}

void Trainer::average_gradients(const std::vector<at::Tensor>& others) {
  std::vector<at::Tensor> gradients;
  const auto add = [&](const at::Tensor& tensor) {
    if (tensor.grad().defined()) {
      gradients.push_back(tensor.grad());
    }
  };
  for (const optim::ParameterGroup& group : optimizer_->groups()) {
    std::ranges::for_each(group.parameters, add);
  }
  std::ranges::for_each(others, add);
  const at::NoGradGuard no_grad;
  dist::average_(*ranks_, gradients);
}

// ---- Passes without gradients ----

void Trainer::for_each_image(const std::string& activity, const methods::BatchFn& fn) {
  pass(images_.first, {.images = images_.first.of_classes(info_.n_old, info_.n_new)}, activity, fn);
}

void Trainer::for_each_augmented(const std::string& activity, const methods::Draw& order,
                                 const methods::BatchFn& fn) {
  methods::Draw augmentation = order;
  augmentation.purpose += ".augmentation";
  pass(images_.first,
       {.images = shuffled_images(images_.first.of_classes(info_.n_old, info_.n_new), order),
        .view = data::View::kAugmented,
        .key = random_->key(augmentation)},
       activity, fn);
}

std::vector<int64_t> Trainer::shuffled_images(const std::vector<int64_t>& images,
                                              const methods::Draw& order) {
  const at::Tensor places = random_->permutation(order, static_cast<int64_t>(images.size()));
  std::vector<int64_t> shuffled;
  for (const int64_t place : at::IntArrayRef(places.const_data_ptr<int64_t>(), images.size())) {
    shuffled.push_back(images.at(static_cast<size_t>(place)));
  }
  return shuffled;
}

void Trainer::pass(ImageSet& set, Reading reading, const std::string& activity,
                   const methods::BatchFn& fn) {
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(reading.images.size());
  set.start(reading.view, std::move(reading.images), options_.evaluation_batch_size, reading.key);
  methods::Batch batch;
  int64_t done = 0;
  while (set.next(batch)) {
    fn(batch);
    done += batch.labels.size(0);
    progress(activity, done, count);
  }
}

// ---- Evaluation ----

class Trainer::SeenTestImages : public methods::TestImages {
 public:
  SeenTestImages(Trainer& trainer, std::string activity)
      : trainer_(trainer),
        activity_(std::move(activity)),
        numbers_(trainer.images_.second.of_classes(0, trainer.info_.n_seen())) {}

  const std::vector<int64_t>& numbers() const override { return numbers_; }
  void for_each_batch(const std::vector<int64_t>& numbers, const methods::BatchFn& fn) override {
    trainer_.pass(trainer_.images_.second, {.images = numbers}, activity_, fn);
  }

 private:
  Trainer& trainer_;
  std::string activity_;
  std::vector<int64_t> numbers_;
};

stats::Evaluation Trainer::evaluate_and_report(
    const std::string& event, const std::string& activity,
    std::vector<std::pair<std::string, EventValue>> fields) {
  const at::NoGradGuard no_grad;
  const Stopwatch watch;
  stats::Evaluation e(task_sizes_, info_.index);
  SeenTestImages images(*this, activity);
  method_->score(images, [&](const at::Tensor& labels, const methods::Scores& scores) {
    const at::Tensor task = scores.task.defined() ? scores.task.cpu() : at::Tensor();
    e.add(labels.cpu(), scores.classes.cpu(), task);
  });
  const std::vector<std::pair<std::string, EventValue>> figures{
      {"task", info_.index},
      {"count", e.count()},
      {"top1", e.top1()},
      {"top5", e.top5()},
      {"per_task", e.per_task()},
      {"old_classes", e.old_classes()},
      {"new_classes", e.new_classes()},
      {"task_id", e.task_id()},
      {"within_task", e.within_task()},
      {"inferred_task", e.inferred_task()},
      {"seconds", watch.seconds()}};
  fields.insert(fields.end(), figures.begin(), figures.end());
  emit(event, std::move(fields));
  return e;
}

void Trainer::measure_forward_transfer() {
  NearestMean learned(info_), pretrained(info_);
  const auto pass_to = [&](ImageSet& set, const std::string& images,
                           void (NearestMean::*take)(const at::Tensor&, const at::Tensor&)) {
    pass(set, {.images = set.of_classes(info_.n_old, info_.n_new)}, "forward transfer, " + images,
         [&](const methods::Batch& batch) {
           (learned.*take)(batch.whole(method_->features_of(batch.images)), batch.labels);
           (pretrained.*take)(batch.whole(nn::plain_pass(vit_, vit_.prefix(batch.images))),
                              batch.labels);
         });
  };
  pass_to(images_.first, "training images", &NearestMean::learn);
  pass_to(images_.second, "test images", &NearestMean::test);
  const double gain = learned.accuracy() - pretrained.accuracy();
  if (std::isfinite(gain)) {  // there are test images
    progress_.forward_transfer.push_back(gain);
  }
  emit("forward_transfer", {{"task", info_.index},
                            {"learned", learned.accuracy()},
                            {"pretrained", pretrained.accuracy()}});
}

void Trainer::evaluate(const std::string& tag) {
  evaluate_and_report("extra_evaluation", tag, {{"tag", tag}});
}

void Trainer::progress(const std::string& activity, int64_t done, int64_t count) {
  emit("stage", {{"task", info_.index}, {"name", activity}, {"done", done}, {"count", count}});
  check_stop();
}

methods::Scores Trainer::scores(const at::Tensor& images) const {
  return method_->scores(images_.first.normalization()(images));
}

// ---- Small things ----

void Trainer::emit(std::string name, std::vector<std::pair<std::string, EventValue>> fields) const {
  if (hooks_.listen) {
    hooks_.listen({std::move(name), std::move(fields)});
  }
}

bool Trainer::stop_asked() const {
  return ranks_->any(hooks_.should_stop && hooks_.should_stop());
}

void Trainer::check_stop() const {
  if (stop_asked()) {
    stop();
  }
}

void Trainer::stop() const {
  NTKCL_FAIL(Interrupted, "train", "stopped in task ", info_.index + 1, " of ", info_.count,
             ", after ", progress_.step, " steps of it");
}

}  // namespace ntkcl::train
