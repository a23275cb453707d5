#pragma once

#include <map>
#include <string>
#include <vector>

#include "ntkcl/methods/state.h"

namespace ntkcl::train {

// Where a run stands between two training steps.
struct Progress {
  int64_t task = 0;    // tasks before it are finished
  bool begun = false;  // its training is under way, or over
  int64_t epoch = 0;   // of the task: those before it are finished; all of them after training
  int64_t step = 0;    // steps of the task that are done
  // Of the epoch: images that are behind it, those of them that were trained on, and the sum of
  // each loss over these.
  int64_t position = 0;
  int64_t epoch_images = 0;
  std::map<std::string, double> epoch_losses;
  // Of the run.
  int64_t training_images = 0;
  int64_t trainable_parameters = 0;
  double seconds = 0;
  double training_seconds = 0;
  std::vector<double> forward_transfer;  // of the tasks that have begun, see RunResult

  template <class Visitor>
  void visit(Visitor& v) {
    v("task", task);
    v("begun", begun);
    v("epoch", epoch);
    v("step", step);
    v("position", position);
    v("epoch_images", epoch_images);
    v("epoch_losses", epoch_losses);
    v("training_images", training_images);
    v("trainable_parameters", trainable_parameters);
    v("seconds", seconds);
    v("training_seconds", training_seconds);
    v("forward_transfer", forward_transfer);
  }
};

// All that a run needs to go on from there and end as if it had not been interrupted, to the bit.
// The frozen backbone, the images and the options are not in it.
struct Checkpoint {
  Progress progress;
  methods::State tensors;
};

}  // namespace ntkcl::train
