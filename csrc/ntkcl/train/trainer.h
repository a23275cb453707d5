#pragma once

#include <chrono>
#include <deque>
#include <limits>
#include <memory>
#include <optional>

#include "ntkcl/methods/table.h"
#include "ntkcl/stats/metrics.h"
#include "ntkcl/train/checkpoint.h"
#include "ntkcl/train/event.h"
#include "ntkcl/train/image_set.h"
#include "ntkcl/train/options.h"
#include "ntkcl/train/pending_losses.h"
#include "ntkcl/train/step_replay.h"

namespace ntkcl::train {

struct RunResult {
  stats::Summary summary;
  std::vector<stats::Evaluation> evaluations;  // after each task
  std::vector<int64_t> task_sizes;             // how many classes
  double seconds = 0, training_seconds = 0;
  int64_t training_images = 0;  // images that went through a training step
  int64_t trainable_parameters = 0;
  int64_t stored_parameters = 0;  // numbers in the method's state after the last task
  int64_t skipped_images = 0;
  // Before each task but the first: the accuracy on its classes alone of the nearest class mean
  // (nearest_mean.h) by the features learned so far, minus that by the pretrained backbone's; the
  // mean over the tasks. Lopez-Paz and Ranzato 2017, eq. 4, with class means in the place of the
  // head, which knows nothing of classes to come. NaN where it is not measured.
  double forward_transfer = std::numeric_limits<double>::quiet_NaN();
};

// Who accompanies a run; each may be empty.
struct Hooks {
  EventFn listen;                                 // hears every event
  std::function<bool()> should_stop;              // asked after every step; true ends the run
  std::function<void(const Checkpoint&)> save{};  // keeps a checkpoint
};

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The task loop: for every task train, run the method's stages, test on all seen classes. Knows no
// method by name.
//
// Note: checkpoints are taken between two training steps and between two tasks. Stages and the
// evaluation follow from the state after training, so a run that is stopped among them goes back
// there.
class Trainer : private methods::TaskServices {
 public:
  // Checks everything that can be checked before work begins. `random` null: Philox from the seed.
  // `ranks` train together, with the same arguments each.
  Trainer(const methods::MakeMethod& make, TrainOptions options,
          const nn::VisionTransformer& backbone, const RunData& data,
          std::unique_ptr<methods::RandomSource> random = nullptr,
          std::shared_ptr<dist::Communicator> ranks = dist::single());
  ~Trainer() override;

  // Begins after `tasks` tasks that were learned elsewhere: their state. Their evaluations are not
  // known, and count as of no image. ValueError for a method that wants their images again.
  void begin_after(int64_t tasks, const methods::State& learned);

  // Runs all tasks, or those that are left after a checkpoint. When it is stopped it ends with
  // Interrupted, a loss that is not finite with NumericalError, a checkpoint that is not of this
  // run with ValueError. A trainer runs once.
  // With several ranks, all end so together; one that fails alone leaves the others, and they end
  // with RankError. On CUDA, of one rank, a step's losses are known when the next step has been
  // started: its event and its NumericalError come then, but before anything is saved.
  RunResult run(const Hooks& hooks, const std::optional<Checkpoint>& from = std::nullopt);

  methods::Method& method() { return *method_; }
  // Scores (B, n_seen; of some methods (B, classes)) of uint8 images (B, 3, S, S) that are already
  // transformed.
  methods::Scores scores(const at::Tensor& images) const;

 private:
  class SeenTestImages;

  const methods::TaskInfo& task() const override { return info_; }
  methods::RandomSource& random() override { return replay_ ? replay_->random() : *random_; }
  void for_each_image(const std::string& activity, const methods::BatchFn& fn) override;
  void for_each_augmented(const std::string& activity, const methods::Draw& order,
                          const methods::BatchFn& fn) override;
  void average_gradients(const std::vector<at::Tensor>& others) override;
  void evaluate(const std::string& tag) override;
  void progress(const std::string& activity, int64_t done, int64_t count) override;

  methods::TaskInfo info_of(int64_t task) const;
  int64_t epochs_of(int64_t task) const;
  int64_t steps_of(int64_t task) const;
  // Store positions of the images that a task's steps read.
  std::vector<int64_t> images_of(const methods::TaskInfo& info) const;

  RunResult run_tasks();
  void run_task();
  void measure_forward_transfer();
  // What rank 0 has learned, on every rank: where each has computed it for itself, a method's own
  // random numbers or another processor's rounding may have made it differ.
  void share_state();
  void check_states_fit();  // ValueError on every rank where they do not
  void begin_training();    // makes the optimiser of what the method trains
  void train_task();
  void train_epoch(int64_t epochs, double learning_rate);
  void train_step(const methods::Batch& batch, double learning_rate);
  methods::Losses gradients(const methods::Batch& batch, const methods::StepInfo& step);
  // What is told of a step.
  struct Step {
    int64_t epoch = 0, step = 0, images = 0;
    double learning_rate = 0;
    std::vector<PendingLosses> losses{};  // of each pass
  };
  // Reports the steps but the last `kept`; NumericalError names the first whose losses are not
  // finite.
  void report_steps(size_t kept);
  void report_all_steps();  // what they still take is time of training
  void report(const Step& step);
  // The losses of a pass as numbers.
  std::map<std::string, double> finite(const Step& step, const PendingLosses& losses) const;

  // Between two steps: saves where it is time to, and ends the run where the user wants that.
  void pause(bool save_anyway);
  void save();
  void restore(const Checkpoint& from);
  void check_place(const Progress& p) const;
  // Of everything but the optimiser.
  void visit_state(const methods::StateVisitor& visitor);
  methods::VisitFn state() {
    return [this](const methods::StateVisitor& visitor) { visit_state(visitor); };
  }

  // What a pass without gradients reads.
  struct Reading {
    std::vector<int64_t> images;  // store positions
    data::View view = data::View::kTest;
    uint64_t key = 0;  // of the augmentation
  };
  void pass(ImageSet& set, Reading reading, const std::string& activity,
            const methods::BatchFn& fn);
  // These in the order of a random draw.
  std::vector<int64_t> shuffled_images(const std::vector<int64_t>& images,
                                       const methods::Draw& order);
  // Evaluates, and reports it as an event of this name with `fields` before its own.
  stats::Evaluation evaluate_and_report(const std::string& event, const std::string& activity,
                                        std::vector<std::pair<std::string, EventValue>> fields);
  void emit(std::string name, std::vector<std::pair<std::string, EventValue>> fields) const;
  bool stop_asked() const;  // of any rank
  void check_stop() const;
  [[noreturn]] void stop() const;

  TrainOptions options_;
  at::Device device_;
  nn::VisionTransformer vit_;
  std::vector<int64_t> class_order_;
  std::shared_ptr<dist::Communicator> ranks_;
  std::pair<ImageSet, ImageSet> images_;  // for training, for tests
  std::unique_ptr<methods::RandomSource> random_;
  std::vector<int64_t> task_sizes_;
  std::unique_ptr<methods::Method> method_;
  Hooks hooks_;

  bool started_ = false, resumed_ = false;
  Progress progress_, begun_with_;
  methods::TaskInfo info_;
  int64_t task_steps_ = 0;
  std::unique_ptr<optim::Optimizer> optimizer_;  // while a task is trained
  std::unique_ptr<StepReplay> replay_;           // the same, with cuda_graph
  // Steps begun whose losses are not read yet.
  std::deque<Step> unreported_;
  std::vector<stats::Evaluation> evaluations_;  // after each finished task
  Stopwatch watch_, since_saved_;
  int64_t steps_since_saved_ = 0;
};

}  // namespace ntkcl::train
