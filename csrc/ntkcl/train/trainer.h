#pragma once

#include <chrono>
#include <memory>

#include "ntkcl/data/loader.h"
#include "ntkcl/methods/table.h"
#include "ntkcl/stats/metrics.h"
#include "ntkcl/train/event.h"
#include "ntkcl/train/options.h"

namespace ntkcl::train {

// The images of a run. Labels of the stores are class indices of the data set; `class_order[k]` is
// the data set's class that is learned as number k.
struct RunData {
  std::shared_ptr<data::ImageStore> train, test;
  std::vector<int64_t> class_order;
  data::TransformOptions transform;
  data::LoaderOptions loader;
  std::vector<double> mean{0, 0, 0}, std{1, 1, 1};  // of pixels in [0, 1], per channel
};

struct RunResult {
  stats::Summary summary;
  std::vector<stats::Evaluation> evaluations;  // after each task
  double seconds = 0, training_seconds = 0;
  int64_t training_images = 0;  // images that went through a training step
  int64_t trainable_parameters = 0;
  int64_t skipped_images = 0;
};

// The task loop: for every task train, run the method's stages, test on all seen classes. Knows no
// method by name.
class Trainer : private methods::TaskServices {
 public:
  // Checks everything that can be checked before work begins. `random` null: Philox from the seed.
  Trainer(const std::string& method, const OptionMap& method_options, TrainOptions options,
          const nn::VisionTransformer& backbone, RunData data,
          std::unique_ptr<methods::RandomSource> random = nullptr);
  ~Trainer() override;

  // Runs all tasks. `listen` hears every event; `should_stop` is asked after every step, and true
  // ends the run with Interrupted. A loss that is not finite ends it with NumericalError. A trainer
  // runs once.
  RunResult run(const EventFn& listen, const std::function<bool()>& should_stop);

  methods::Method& method() { return *method_; }
  // Scores (B, n_seen; of some methods (B, classes)) of uint8 images (B, 3, S, S) that are already
  // transformed.
  methods::Scores scores(const at::Tensor& images) const;

 private:
  class SeenTestImages;

  const methods::TaskInfo& task() const override { return info_; }
  methods::RandomSource& random() override { return *random_; }
  void for_each_image(const std::string& activity, const methods::BatchFn& fn) override;
  void for_each_augmented(const std::string& activity, const methods::Draw& order,
                          const methods::BatchFn& fn) override;
  void evaluate(const std::string& tag) override;
  void progress(const std::string& activity, int64_t done, int64_t count) override;

  void check_data() const;
  void hold_out();
  void run_task();
  void train_task(std::vector<optim::ParameterGroup> groups);
  void train_epoch(optim::Optimizer& optimizer, int64_t epoch, int64_t epochs,
                   double learning_rate);
  // The losses as numbers; NumericalError names the step of one that is not finite.
  std::map<std::string, double> finite(const methods::Losses& losses, int64_t epoch,
                                       double learning_rate) const;
  void report_step(const std::map<std::string, double>& losses, int64_t epoch, int64_t steps,
                   int64_t images, double learning_rate);
  // Evaluates, and reports it as an event of this name with `fields` before its own.
  stats::Evaluation evaluate_and_report(const std::string& event, const std::string& activity,
                                        std::vector<std::pair<std::string, EventValue>> fields);
  void emit(std::string name, std::vector<std::pair<std::string, EventValue>> fields) const;
  void check_stop() const;

  int64_t epochs_of(int64_t task) const;
  int64_t steps_of(int64_t task) const;
  // Store positions of the images of classes first .. first + count - 1, in store order.
  std::vector<int64_t> images_of(const std::vector<std::vector<int64_t>>& by_class, int64_t first,
                                 int64_t count) const;
  methods::Batch to_device(const data::LoadedBatch& loaded, const data::ImageStore& store) const;
  at::Tensor normalised(const at::Tensor& images) const;
  // What a pass without gradients reads.
  struct Reading {
    data::Loader& loader;
    const data::ImageStore& store;
    std::vector<int64_t> images;
    data::View view = data::View::kTest;
    uint64_t key = 0;  // of the augmentation
  };
  void for_each_view(Reading reading, const std::string& activity, const methods::BatchFn& fn);
  // Images of the task's classes in the order of a random draw.
  std::vector<int64_t> shuffled_images(const methods::Draw& order);

  TrainOptions options_;
  at::Device device_;
  nn::VisionTransformer vit_;
  RunData data_;
  std::unique_ptr<methods::RandomSource> random_;
  std::vector<int64_t> task_sizes_;
  std::vector<int64_t> class_number_;             // of each class of the data set
  std::shared_ptr<data::ImageStore> test_store_;  // training images when a share is held out
  std::vector<std::vector<int64_t>> train_images_,
      test_images_;        // store positions per class number
  at::Tensor mean_, std_;  // (1, 3, 1, 1)
  std::unique_ptr<data::Loader> train_loader_, test_loader_;
  std::unique_ptr<methods::Method> method_;

  bool started_ = false;
  methods::TaskInfo info_;
  int64_t step_ = 0;  // within the task
  std::map<std::string, double> epoch_losses_;
  EventFn listen_;
  std::function<bool()> should_stop_;
  RunResult result_;
};

}  // namespace ntkcl::train
