#include "ntkcl/train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ntkcl/core/error.h"
#include "ntkcl/scenario/task_split.h"
#include "ntkcl/train/compute_setup.h"

namespace ntkcl::train {
namespace {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::vector<int64_t> inverse_order(const std::vector<int64_t>& order) {
  const auto n = static_cast<int64_t>(order.size());
  NTKCL_CHECK(n > 0, "class_order", "expected at least one class, got none");
  std::vector<int64_t> inverse(order.size(), -1);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t c = order[static_cast<size_t>(k)];
    NTKCL_CHECK(c >= 0 && c < n && inverse[static_cast<size_t>(c)] < 0, "class_order",
                "expected a permutation of 0 .. ", n - 1, ", got ", c, " at place ", k);
    inverse[static_cast<size_t>(c)] = k;
  }
  return inverse;
}

std::vector<std::vector<int64_t>> by_class(const data::ImageStore& store,
                                           const std::vector<int64_t>& class_number) {
  std::vector<std::vector<int64_t>> images(class_number.size());
  const std::vector<int64_t>& labels = store.labels();
  for (size_t i = 0; i < labels.size(); ++i) {
    NTKCL_CHECK(labels[i] >= 0 && labels[i] < static_cast<int64_t>(class_number.size()), "data",
                "label of ", store.name(static_cast<int64_t>(i)), ": expected 0 .. ",
                class_number.size() - 1, ", got ", labels[i]);
    const auto number = static_cast<size_t>(class_number[static_cast<size_t>(labels[i])]);
    images[number].push_back(static_cast<int64_t>(i));
  }
  return images;
}

at::Tensor channel_constant(const std::vector<double>& values, const char* key,
                            const at::TensorOptions& options) {
  NTKCL_CHECK(values.size() == 3, "normalize", "'", key, "': expected 3 numbers, got ",
              values.size());
  return at::tensor(values, at::kDouble).view({1, 3, 1, 1}).to(options);
}

}  // namespace

Trainer::Trainer(const std::string& method, const OptionMap& method_options, TrainOptions options,
                 const nn::VisionTransformer& backbone, RunData data,
                 std::unique_ptr<methods::RandomSource> random)
    : options_(std::move(options)),
      device_(resolve_device(options_.device)),
      vit_(prepare_backbone(backbone, options_)),
      data_(std::move(data)),
      random_(std::move(random)),
      class_number_(inverse_order(data_.class_order)),
      test_store_(data_.test) {
  const auto class_count = static_cast<int64_t>(class_number_.size());
  task_sizes_ = scenario::split_classes(class_count, options_.initial_classes, options_.increment);
  train_images_ = by_class(*data_.train, class_number_);
  test_images_ = by_class(*data_.test, class_number_);
  if (!random_) {
    random_ = std::make_unique<methods::RandomSource>(static_cast<uint64_t>(options_.seed));
  }
  check_data();
  if (options_.validation_fraction > 0) {
    hold_out();
  }
  NTKCL_CHECK(data_.transform.image_size == vit_.image_size(), "image_size",
              "expected the backbone's ", vit_.image_size(), ", got ", data_.transform.image_size);
  mean_ = channel_constant(data_.mean, "mean", vit_.options());
  std_ = channel_constant(data_.std, "std", vit_.options());
  NTKCL_CHECK(std_.gt(0).all().item<bool>(), "normalize", "'std': expected positive numbers");

  for (const double rate : {options_.learning_rate, options_.initial_learning_rate}) {
    const bool used = rate > 0 || rate == options_.learning_rate;
    NTKCL_CHECK(
        !used || options_.schedule.kind != "cosine" || options_.schedule.min_learning_rate <= rate,
        "train", "'min_learning_rate': expected at most the learning rate ", rate, ", got ",
        options_.schedule.min_learning_rate);
  }
  data_.loader.pin_memory = device_.is_cuda();
  const data::Transform transform(data_.transform);
  train_loader_ = std::make_unique<data::Loader>(data_.train, transform, data_.loader);
  test_loader_ = std::make_unique<data::Loader>(test_store_, transform, data_.loader);
  info_.count = static_cast<int64_t>(task_sizes_.size());
  method_ = methods::find_method(method).make(method_options, vit_, info_.count, *random_);
}

Trainer::~Trainer() = default;

// A share of each class's training images takes the place of the test images.
void Trainer::hold_out() {
  test_store_ = data_.train;
  for (size_t c = 0; c < train_images_.size(); ++c) {
    std::vector<int64_t>& images = train_images_[c];
    const auto n = static_cast<int64_t>(images.size());
    const auto held =
        static_cast<int64_t>(std::llround(static_cast<double>(n) * options_.validation_fraction));
    NTKCL_CHECK(held > 0 && held < n, "validation_fraction",
                "expected to leave and to hold out at ", "least one image of each class, got ",
                held, " of ", n, " held out");
    // Keyed by the data set's class, not by the seed: every seed holds out the same images.
    methods::RandomSource fixed(0);
    const at::Tensor order = fixed.permutation({"validation", data_.class_order[c]}, n);
    const int64_t* place = order.const_data_ptr<int64_t>();
    std::vector<int64_t> kept, out;
    for (int64_t i = 0; i < n; ++i) {
      (i < held ? out : kept).push_back(images[static_cast<size_t>(place[i])]);
    }
    std::sort(kept.begin(), kept.end());
    std::sort(out.begin(), out.end());
    images = std::move(kept);
    test_images_[c] = std::move(out);
  }
}

void Trainer::check_data() const {
  for (size_t c = 0; c < train_images_.size(); ++c) {
    NTKCL_CHECK(!train_images_[c].empty(), "data", "class ", data_.class_order[c],
                ": expected at least one training image, got none");
    NTKCL_CHECK(!test_images_[c].empty(), "data", "class ", data_.class_order[c],
                ": expected at least one test image, got none");
  }
}

RunResult Trainer::run(const EventFn& listen, const std::function<bool()>& should_stop) {
  NTKCL_CHECK(!started_, "train", "expected a new trainer: this one has run already");
  started_ = true;
  const ComputeScope scope(options_, device_);
  const Stopwatch watch;
  listen_ = listen;
  should_stop_ = should_stop;
  result_ = {};
  int64_t steps = 0;
  for (int64_t t = 0; t < info_.count; ++t) {
    steps += steps_of(t);
  }
  emit("run_begin", {{"tasks", info_.count}, {"task_sizes", task_sizes_}, {"steps", steps}});
  for (int64_t t = 0; t < info_.count; ++t) {
    info_ = {.index = t,
             .count = info_.count,
             .n_old = info_.n_seen(),
             .n_new = task_sizes_[static_cast<size_t>(t)],
             .initial_classes = options_.initial_classes,
             .increment = options_.increment,
             .batch_size = options_.batch_size,
             .class_ids = data_.class_order};
    run_task();
  }
  result_.summary = stats::summarize(result_.evaluations);
  result_.seconds = watch.seconds();
  result_.skipped_images = train_loader_->skipped() + test_loader_->skipped();
  return result_;
}

void Trainer::run_task() {
  const Stopwatch watch;
  step_ = 0;
  const auto first = data_.class_order.begin() + info_.n_old;
  auto groups = method_->before_task(*this);
  emit("task_begin",
       {{"task", info_.index},
        {"classes", std::vector<int64_t>(first, first + info_.n_new)},
        {"train_images",
         static_cast<int64_t>(images_of(train_images_, info_.n_old, info_.n_new).size())},
        {"steps", steps_of(info_.index)}});
  train_task(std::move(groups));
  for (const std::string& stage : method_->stages(info_)) {
    check_stop();
    try {
      method_->run_stage(stage, *this);
    } catch (const NumericalError& error) {  // what the last step left is not finite
      NTKCL_FAIL(NumericalError, "train", "after step ", step_ - 1, " of task ", info_.index, ": ",
                 error.what());
    }
  }
  result_.evaluations.push_back(evaluate_and_report("evaluation", "evaluation", {}));
  emit("task_end", {{"task", info_.index}, {"seconds", watch.seconds()}});
}

// ---- Training ----

int64_t Trainer::epochs_of(int64_t task) const {
  return task == 0 && options_.initial_epochs > 0 ? options_.initial_epochs : options_.epochs;
}

int64_t Trainer::steps_of(int64_t task) const {
  if (!method_->trains({.index = task, .count = info_.count})) {
    return 0;
  }
  const auto first = task_sizes_.begin();
  const int64_t before = std::accumulate(first, first + task, int64_t{0});
  const auto images = static_cast<int64_t>(
      images_of(train_images_, before, task_sizes_[static_cast<size_t>(task)]).size());
  return epochs_of(task) * ((images + options_.batch_size - 1) / options_.batch_size);
}

void Trainer::train_task(std::vector<optim::ParameterGroup> groups) {
  if (groups.empty()) {
    return;
  }
  int64_t trained = 0;
  for (const optim::ParameterGroup& group : groups) {
    for (const at::Tensor& parameter : group.parameters) {
      trained += parameter.numel();
    }
  }
  result_.trainable_parameters = std::max(result_.trainable_parameters, trained);
  const Stopwatch watch;
  const auto optimizer = optim::make_optimizer(options_.optimizer, std::move(groups));
  const int64_t epochs = epochs_of(info_.index);
  const bool own = info_.first() && options_.initial_learning_rate > 0;
  const double first_rate = own ? options_.initial_learning_rate : options_.learning_rate;
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    const double rate =
        optim::schedule_learning_rates(*optimizer, options_.schedule, first_rate, epoch, epochs);
    train_epoch(*optimizer, epoch, epochs, rate);
  }
  result_.training_seconds += watch.seconds();
}

void Trainer::train_epoch(optim::Optimizer& optimizer, int64_t epoch, int64_t epochs,
                          double learning_rate) {
  const Stopwatch watch;
  epoch_losses_.clear();
  train_loader_->start(data::View::kAugmented, shuffled_images({"order", info_.index, epoch}),
                       options_.batch_size, random_->key({"augmentation", info_.index, epoch}));
  data::LoadedBatch loaded;
  int64_t seen = 0;
  const int64_t steps = steps_of(info_.index);
  while (train_loader_->next(loaded)) {
    const methods::Batch batch = to_device(loaded, *data_.train);
    std::map<std::string, double> losses;
    optimizer.step([&](int pass) {
      // Checked before the optimiser moves anything.
      const methods::StepInfo step{.step = step_,
                                   .pass = pass,
                                   .passes = optimizer.passes(),
                                   .steps = steps,
                                   .epoch_steps = steps / epochs};
      auto of_pass = finite(method_->gradients(batch, step, *this), epoch, learning_rate);
      if (pass == 0) {
        losses = std::move(of_pass);
      }
    });
    ++step_;
    seen += batch.labels.size(0);
    report_step(losses, epoch, steps, batch.labels.size(0), learning_rate);
    check_stop();
  }
  result_.training_images += seen;
  for (auto& [name, sum] : epoch_losses_) {
    sum /= static_cast<double>(std::max<int64_t>(seen, 1));
  }
  emit("epoch", {{"task", info_.index},
                 {"epoch", epoch},
                 {"epochs", epochs},
                 {"learning_rate", learning_rate},
                 {"losses", epoch_losses_},
                 {"seconds", watch.seconds()},
                 {"images_per_second", static_cast<double>(seen) / watch.seconds()}});
}

std::map<std::string, double> Trainer::finite(const methods::Losses& losses, int64_t epoch,
                                              double learning_rate) const {
  std::vector<at::Tensor> scalars;
  for (const auto& [name, tensor] : losses) {
    scalars.push_back(tensor.to(at::kDouble));
  }
  const at::Tensor host = at::stack(scalars).cpu();  // one copy a step, not one a loss
  std::map<std::string, double> values;
  for (size_t i = 0; i < losses.size(); ++i) {
    const double value = host.const_data_ptr<double>()[i];
    values[losses[i].first] = value;
    if (!std::isfinite(value)) {
      NTKCL_FAIL(NumericalError, "train", "the loss '", losses[i].first, "' is ", value,
                 " at step ", step_, " of task ", info_.index, " (epoch ", epoch,
                 "); a smaller learning rate than ", learning_rate, " may help");
    }
  }
  return values;
}

void Trainer::report_step(const std::map<std::string, double>& losses, int64_t epoch, int64_t steps,
                          int64_t images, double learning_rate) {
  for (const auto& [name, value] : losses) {
    epoch_losses_[name] += value * static_cast<double>(images);
  }
  emit("step", {{"task", info_.index},
                {"epoch", epoch},
                {"step", step_ - 1},
                {"steps", steps},
                {"images", images},
                {"learning_rate", learning_rate},
                {"losses", losses}});
}

// ---- Passes without gradients ----

void Trainer::for_each_image(const std::string& activity, const methods::BatchFn& fn) {
  for_each_view({.loader = *train_loader_,
                 .store = *data_.train,
                 .images = images_of(train_images_, info_.n_old, info_.n_new)},
                activity, fn);
}

void Trainer::for_each_augmented(const std::string& activity, const methods::Draw& order,
                                 const methods::BatchFn& fn) {
  methods::Draw augmentation = order;
  augmentation.purpose += ".augmentation";
  for_each_view({.loader = *train_loader_,
                 .store = *data_.train,
                 .images = shuffled_images(order),
                 .view = data::View::kAugmented,
                 .key = random_->key(augmentation)},
                activity, fn);
}

std::vector<int64_t> Trainer::shuffled_images(const methods::Draw& order) {
  const std::vector<int64_t> images = images_of(train_images_, info_.n_old, info_.n_new);
  const at::Tensor places = random_->permutation(order, static_cast<int64_t>(images.size()));
  std::vector<int64_t> shuffled;
  for (const int64_t place : at::IntArrayRef(places.const_data_ptr<int64_t>(), images.size())) {
    shuffled.push_back(images.at(static_cast<size_t>(place)));
  }
  return shuffled;
}

void Trainer::for_each_view(Reading reading, const std::string& activity,
                            const methods::BatchFn& fn) {
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(reading.images.size());
  reading.loader.start(reading.view, std::move(reading.images), options_.evaluation_batch_size,
                       reading.key);
  data::LoadedBatch loaded;
  int64_t done = 0;
  while (reading.loader.next(loaded)) {
    fn(to_device(loaded, reading.store));
    done += loaded.indices.size(0);
    progress(activity, done, count);
  }
}

// ---- Evaluation ----

class Trainer::SeenTestImages : public methods::TestImages {
 public:
  SeenTestImages(Trainer& trainer, std::string activity)
      : trainer_(trainer),
        activity_(std::move(activity)),
        numbers_(trainer.images_of(trainer.test_images_, 0, trainer.info_.n_seen())) {}

  const std::vector<int64_t>& numbers() const override { return numbers_; }
  void for_each_batch(const std::vector<int64_t>& numbers, const methods::BatchFn& fn) override {
    trainer_.for_each_view(
        {.loader = *trainer_.test_loader_, .store = *trainer_.test_store_, .images = numbers},
        activity_, fn);
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

void Trainer::evaluate(const std::string& tag) {
  evaluate_and_report("extra_evaluation", tag, {{"tag", tag}});
}

void Trainer::progress(const std::string& activity, int64_t done, int64_t count) {
  emit("stage", {{"task", info_.index}, {"name", activity}, {"done", done}, {"count", count}});
  check_stop();
}

methods::Scores Trainer::scores(const at::Tensor& images) const {
  NTKCL_CHECK(images.scalar_type() == at::kByte, "scores", "expected uint8 images, got ",
              images.scalar_type());
  return method_->scores(normalised(images));
}

methods::Batch Trainer::to_device(const data::LoadedBatch& loaded,
                                  const data::ImageStore& store) const {
  const int64_t n = loaded.indices.size(0);
  at::Tensor labels = at::empty({n}, at::kLong);
  int64_t* out = labels.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    const auto image = static_cast<size_t>(loaded.indices.const_data_ptr<int64_t>()[i]);
    out[i] = class_number_[static_cast<size_t>(store.labels()[image])];
  }
  return {normalised(loaded.images), labels.to(device_), loaded.indices};
}

at::Tensor Trainer::normalised(const at::Tensor& images) const {
  return images.to(device_).to(vit_.options()).div_(255).sub_(mean_).div_(std_);
}

// ---- Small things ----

std::vector<int64_t> Trainer::images_of(const std::vector<std::vector<int64_t>>& by_class,
                                        int64_t first, int64_t count) const {
  std::vector<int64_t> images;
  for (int64_t c = first; c < first + count; ++c) {
    const auto& of_class = by_class[static_cast<size_t>(c)];
    images.insert(images.end(), of_class.begin(), of_class.end());
  }
  std::sort(images.begin(), images.end());
  return images;
}

void Trainer::emit(std::string name, std::vector<std::pair<std::string, EventValue>> fields) const {
  if (listen_) {
    listen_({std::move(name), std::move(fields)});
  }
}

void Trainer::check_stop() const {
  if (should_stop_ && should_stop_()) {
    NTKCL_FAIL(Interrupted, "train", "stopped in task ", info_.index,
               ", steps done there: ", step_);
  }
}

}  // namespace ntkcl::train
