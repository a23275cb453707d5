#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ntkcl/core/options.h"
#include "ntkcl/optim/optimizer.h"

// The learning rate of each epoch of a task.
namespace ntkcl::optim {

struct ScheduleOptions {
  std::string kind = "cosine";
  double min_learning_rate = 0;
  std::vector<int64_t> milestones;
  double factor = 0.1;
  int64_t hold_epochs = 0;

  template <class Visitor>
  void visit(Visitor& v) {
    v("schedule", kind, one_of({"cosine", "multistep", "constant"}),
      "learning rate over the epochs of a task");
    v("min_learning_rate", min_learning_rate, at_least(0), "where the cosine schedule tends to");
    v("milestones", milestones, at_least(1),
      "epochs (from 0) from which the multistep schedule multiplies the rate once more");
    v("milestone_factor", factor, above(0), "what the multistep schedule multiplies the rate by");
    v("hold_epochs", hold_epochs, at_least(0),
      "epochs for which the cosine schedule repeats its first rate (LoRAC-IPC's release: 1)");
  }
};

// Rate of epoch `epoch` (0 .. epochs - 1) of a task.
//   cosine:    min + (base - min) (1 + cos(pi e / epochs)) / 2, e = max(0, epoch - hold_epochs);
//              stepped per epoch, so the last epoch is not at min
//   multistep: base * factor^(number of milestones <= epoch)
//   constant:  base
// ValueError for an epoch outside the task, or a base below the cosine's min.
double learning_rate_at(const ScheduleOptions& options, double base, int64_t epoch, int64_t epochs);

// Sets the rate of every group to that of a schedule from base times the group's
// learning_rate_scale; all groups share the floor, but one whose rate lies below it already keeps
// that. Returns the rate for scale 1.
double schedule_learning_rates(Optimizer& optimizer, const ScheduleOptions& options, double base,
                               int64_t epoch, int64_t epochs);

}  // namespace ntkcl::optim
