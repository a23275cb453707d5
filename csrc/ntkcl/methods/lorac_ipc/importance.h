#pragma once

#include <string>

#include "ntkcl/methods/state.h"

// Important-parameter constraints: which weight matrices a task has made important, and which of
// them freeze (arXiv 2504.13407; specification section 4). A matrix is one type m in one block l.
namespace ntkcl::methods::lorac_ipc {

// The smoothed importance and uncertainty of each matrix, or of each entry, over a task's steps:
//
//   I = mean_ij |W_ij G_ij|,  mean <- a mean + (1 - a) I,  doubt <- b doubt + (1 - b) |I - mean|
//
// with the updated mean; both start at 0. The score is their product. Plain means have a = b =
// (k - 1) / k in step k.
class ImportanceAverage {
 public:
  // `like`: type and device of the importances to come.
  ImportanceAverage(double mean_decay, double uncertainty_decay, bool plain = false,
                    const at::TensorOptions& like = at::kDouble);

  // The importances of one step, of any shape.
  void add(const at::Tensor& importance);
  // Of that shape; (0) before the first step, as are mean and uncertainty.
  at::Tensor score() const;
  void visit_state(const std::string& prefix, const StateVisitor& visitor);
  const at::Tensor& mean() const { return mean_; }
  const at::Tensor& uncertainty() const { return uncertainty_; }

 private:
  double mean_decay_, uncertainty_decay_;
  bool plain_;
  at::Tensor mean_, uncertainty_;
  int64_t steps_ = 0;
};

struct Selection {
  double threshold = 0.05;     // share of the matrices that freezes after each task; 0: none
  bool of_new = false;         // share of the matrices of non-zero score instead (`new_mask`)
  std::string rule = "exact";  // repair 12.2
};

// The masks in force during the next task: 1 free, 0 frozen for good. mask and score (types,
// blocks), the score on any device; that of a frozen matrix does not count.
//
//   exact     freezes the k free matrices of highest positive score, fewer if there are fewer;
//             among equals the earlier type, then the earlier block
//   release   freezes every matrix whose score is at least the k-th highest, frozen ones counting
//             as 0; ValueError where k = 0, as the released code cannot do it
//
// with k = floor(count * threshold).
at::Tensor freeze_important(const at::Tensor& mask, const at::Tensor& score,
                            const Selection& selection);

}  // namespace ntkcl::methods::lorac_ipc
