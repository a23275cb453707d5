#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "ntkcl/dist/rows.h"
#include "ntkcl/methods/random.h"
#include "ntkcl/methods/state.h"
#include "ntkcl/optim/optimizer.h"

// What a continual-learning method is, and what it may ask of the loop that runs it. A method knows
// nothing of files, device names or Python; the loop knows no method by name.
namespace ntkcl::methods {

// Classes are numbered in the order in which they are learned: task t holds the classes
// n_old .. n_old + n_new - 1.
struct TaskInfo {
  int64_t index = 0;  // t
  int64_t count = 1;  // T
  int64_t n_old = 0;
  int64_t n_new = 0;
  int64_t increment = 0;             // as configured
  int64_t batch_size = 0;            // as configured; the last batch may be smaller
  std::vector<int64_t> class_ids{};  // of all tasks: the data set's class of each number
  std::vector<int64_t> sizes{};      // of all tasks: how many classes

  bool first() const { return index == 0; }
  bool last() const { return index + 1 == count; }
  int64_t n_seen() const { return n_old + n_new; }
  int64_t n_classes() const { return static_cast<int64_t>(class_ids.size()); }
  // The task of each class seen.
  std::vector<int64_t> tasks_of_classes() const {
    std::vector<int64_t> tasks;
    for (int64_t t = 0; t <= index; ++t) {
      tasks.insert(tasks.end(), static_cast<size_t>(sizes[static_cast<size_t>(t)]), t);
    }
    return tasks;
  }
};

// Classes first .. first + count - 1.
struct ClassRange {
  int64_t first = 0;
  int64_t count = 0;
};

// Images of this rank, and all else of the whole batch.
struct Batch {
  at::Tensor images;  // (b, 3, S, S), normalised, in the backbone's dtype and device; alone: b = B
  at::Tensor labels;  // (B) int64, class numbers
  // (B) int64 on the CPU: which images of their set these are; the same in the whole run.
  at::Tensor numbers{};
  dist::Rows rows{};  // which of the B images these are

  // What was computed of the images, (.., b, ..), of the whole batch, (.., B, ..): with gradients.
  at::Tensor whole(const at::Tensor& own, int64_t dim = 0) const { return rows.whole(own, dim); }
};

struct StepInfo {
  int64_t step = 0;         // within the task, from 0
  int64_t pass = 0;         // which gradient of this step the optimiser asks for (SAM asks for two)
  int64_t passes = 1;       // how many it asks for
  int64_t steps = 0;        // of the task, 0 where not known
  int64_t epoch_steps = 0;  // of an epoch, 0 where not known
};

// Scalars that stay on the device; the loop reads them when it does not hurt.
using Losses = std::vector<std::pair<std::string, at::Tensor>>;
using BatchFn = std::function<void(const Batch&)>;

// The largest score is the prediction.
struct Scores {
  at::Tensor classes;  // (B, n_seen); or (B, n) of all classes, where one not seen may be predicted
  at::Tensor task{};   // (B) int64: the task inferred, where a method infers it before the class
};
using ScoresFn = std::function<void(const at::Tensor& labels, const Scores& scores)>;

// The test images of all classes seen so far, under the test transform.
class TestImages {
 public:
  virtual ~TestImages() = default;
  virtual const std::vector<int64_t>& numbers() const = 0;
  // Those of these numbers, in their order.
  virtual void for_each_batch(const std::vector<int64_t>& numbers, const BatchFn& fn) = 0;
};

// All that a method may ask of the loop.
class TaskServices {
 public:
  virtual ~TaskServices() = default;
  virtual const TaskInfo& task() const = 0;
  virtual RandomSource& random() = 0;
  // The task's training images under the test transform, in a fixed order. `activity` names it to
  // the one who watches the progress.
  virtual void for_each_image(const std::string& activity, const BatchFn& fn) = 0;
  // The same as an epoch of training reads them: augmented, in an order drawn for `order`.
  virtual void for_each_augmented(const std::string& activity, const Draw& order,
                                  const BatchFn& fn) = 0;
  // Of the trained parameters and of `others`: what backward passes have left in .grad becomes the
  // gradient of the whole batch's loss. Wanted once a pass, before anything reads a gradient.
  virtual void average_gradients(const std::vector<at::Tensor>& others) = 0;
  // An evaluation beside that at the task's end, reported under `tag`.
  virtual void evaluate(const std::string& tag) = 0;
  // For work without images: tells how far it is, and ends the run where the user wants that.
  virtual void progress(const std::string& activity, int64_t done, int64_t count) = 0;
};

class Method {
 public:
  virtual ~Method() = default;

  // Whether this task has training steps at all.
  virtual bool trains(const TaskInfo&) const { return true; }
  // The classes whose images the steps read: those of the task. A method that reads older ones has
  // kept their images.
  virtual ClassRange trains_on(const TaskInfo& task) const { return {task.n_old, task.n_new}; }
  // New heads, bases, features of the old model: all that a task's beginning changes in the state.
  virtual void before_task(TaskServices&) {}
  // What the task trains; empty if nothing is. Follows before_task, or the loading of a state from
  // the midst of the task: what it prepares follows from the state.
  virtual std::vector<optim::ParameterGroup> trained(const TaskInfo&) { return {}; }
  // Fills .grad of the trained parameters, which come without gradients. One left undefined is
  // zero. Losses are of the whole batch: see Batch::whole.
  virtual Losses gradients(const Batch& batch, const StepInfo& step, TaskServices& services) = 0;
  // Whether gradients() does the same with every full batch of these steps of a task, but for
  // numbers that come from the batch, the parameters and RandomSource::placed: then what it starts
  // can be replayed. `step`'s pass may still make a difference.
  virtual bool repeats(const StepInfo&) const { return false; }
  // What follows training, in order: merging, statistics, alignment.
  virtual std::vector<std::string> stages(const TaskInfo& task) const = 0;
  virtual void run_stage(const std::string& stage, TaskServices& services) = 0;
  virtual Scores scores(const at::Tensor& images) const = 0;
  // What the classes are told apart by, (B, D): by the weights of the last task.
  virtual at::Tensor features_of(const at::Tensor& images) const = 0;
  // The same of a run's test images, each once, in any order and batches: for methods that keep
  // what does not change from one evaluation to the next.
  virtual void score(TestImages& images, const ScoresFn& fn) {
    images.for_each_batch(images.numbers(), [&](const Batch& batch) {
      const Scores own = scores(batch.images);
      fn(batch.labels,
         {batch.whole(own.classes), own.task.defined() ? batch.whole(own.task) : at::Tensor()});
    });
  }
  virtual void visit_state(const StateVisitor& visitor) = 0;
  // What score() keeps of the run's test images: no part of what is learned, but a resumed run is
  // the same to the bit only if nothing is computed in another order.
  virtual void visit_test_state(const StateVisitor&) {}
};

}  // namespace ntkcl::methods
