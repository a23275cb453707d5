#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/train/trainer.h"

// What of a trainer is in a checkpoint, and the way back.
namespace ntkcl::train {
namespace {

const std::string kOptimizer = "optimizer.";  // begins the names of its state

}  // namespace

void Trainer::visit_state(const methods::StateVisitor& visitor) {
  const auto named = [&](const std::string& prefix) {
    return [&visitor, prefix](const std::string& name, at::Tensor& tensor) {
      visitor(prefix + name, tensor);
    };
  };
  method_->visit_state(named("method."));
  method_->visit_test_state(named("test."));
  for (size_t t = 0; t < evaluations_.size(); ++t) {
    stats::Evaluation& evaluation = evaluations_[t];
    at::Tensor labels = evaluation.labels(), records = evaluation.records(),
               confidences = evaluation.confidences();
    const auto visit = named("evaluation." + std::to_string(t) + ".");
    visit("labels", labels);
    visit("records", records);
    visit("confidences", confidences);
    evaluation.restore(labels, records, confidences);
  }
  for (ImageSet* set : {&images_.first, &images_.second}) {
    at::Tensor skipped = set->skipped();
    visitor(set == &images_.first ? "skipped.train" : "skipped.test", skipped);
    set->count_as_skipped(skipped);
  }
}

void Trainer::save() {
  since_saved_ = {};
  steps_since_saved_ = 0;
  if (!hooks_.save) {
    return;
  }
  Checkpoint checkpoint;
  progress_.seconds = begun_with_.seconds + watch_.seconds();
  checkpoint.progress = progress_;
  checkpoint.tensors = methods::copy_state(state());
  if (optimizer_) {
    optimizer_->visit_state([&](const std::string& name, at::Tensor& tensor) {
      checkpoint.tensors[kOptimizer + name] = tensor.clone();
    });
  }
  hooks_.save(checkpoint);
  since_saved_ = {};  // writing takes time
}

void Trainer::check_place(const Progress& p) const {
  NTKCL_CHECK(0 <= p.task && p.task <= info_.count, "resume", "'task': expected 0 .. ", info_.count,
              ", got ", p.task);
  const bool over = p.task == info_.count;
  const methods::TaskInfo info = over ? methods::TaskInfo() : info_of(p.task);
  const int64_t steps = over ? 0 : steps_of(p.task), epochs = over ? 0 : epochs_of(p.task);
  const auto images = static_cast<int64_t>(images_of(info).size());
  const bool at_start = p.epoch == 0 && p.step == 0 && p.position == 0;
  NTKCL_CHECK((p.begun ? !over : at_start) && 0 <= p.step && p.step <= steps && 0 <= p.epoch &&
                  p.epoch <= epochs && 0 <= p.position && p.position <= images &&
                  p.position % options_.batch_size == 0 && (p.epoch < epochs || p.position == 0) &&
                  0 <= p.epoch_images && p.epoch_images <= p.position,
              "resume", "expected a place among the ", steps, " steps of task ", p.task,
              ", got step ", p.step, ", epoch ", p.epoch, ", image ", p.position);
  NTKCL_CHECK(p.training_images >= 0 && p.trainable_parameters >= 0 && p.seconds >= 0 &&
                  p.training_seconds >= 0 && std::isfinite(p.seconds + p.training_seconds),
              "resume", "expected counts and times from 0 on, got ", p.training_images, " images, ",
              p.trainable_parameters, " parameters, ", p.seconds, " and ", p.training_seconds,
              " seconds");
  const std::vector<double>& gains = p.forward_transfer;
  NTKCL_CHECK(static_cast<int64_t>(gains.size()) <= p.task &&
                  std::ranges::all_of(gains, [](double g) { return std::abs(g) <= 100; }),
              "resume", "'forward_transfer': expected at most ", p.task,
              " differences of percentages, got ", at::ArrayRef<double>(gains));
}

void Trainer::restore(const Checkpoint& from) {
  check_place(from.progress);
  resumed_ = true;
  progress_ = from.progress;
  const Progress& p = progress_;
  for (int64_t t = 0; t < p.task; ++t) {
    evaluations_.emplace_back(task_sizes_, t);
  }
  methods::State learned, of_optimizer;
  for (const auto& [name, tensor] : from.tensors) {
    if (name.starts_with(kOptimizer)) {
      of_optimizer[name.substr(kOptimizer.size())] = tensor;
    } else {
      learned[name] = tensor;
    }
  }
  methods::load_state(state(), learned, {});
  if (p.begun) {
    info_ = info_of(p.task);
    begin_training();
  }
  NTKCL_CHECK(optimizer_ || of_optimizer.empty(), "resume", "expected no state of an optimiser ",
              "between two tasks, got '", of_optimizer.begin()->first, "'");
  if (optimizer_) {
    methods::load_state(methods::visit_of(*optimizer_), of_optimizer, {.same_sizes = true});
  }
}

void Trainer::pause(bool save_anyway) {
  const bool stops = stop_asked();
  const bool due =
      (options_.checkpoint_steps > 0 && steps_since_saved_ >= options_.checkpoint_steps) ||
      (options_.checkpoint_minutes > 0 &&
       since_saved_.seconds() >= 60 * options_.checkpoint_minutes);
  if (save_anyway || stops || due) {
    report_all_steps();  // nothing that is not finite is saved
    save();
  }
  if (stops) {
    stop();
  }
}

}  // namespace ntkcl::train
