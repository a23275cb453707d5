#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

// Accuracies of class-incremental learning (NTK-CL specification section 7, LoRAC-IPC section 11,
// RAA section 7). All are percentages in full precision; one that no image defines is NaN. Classes
// are counted in the order in which they arrive: task t holds the task_sizes[t] classes that follow
// those of task t - 1, whatever the sizes.
namespace ntkcl::stats {

// The test after one task, on images of all classes seen so far.
class Evaluation {
 public:
  // task_sizes: classes of each task, at least up to `task`, the 0-based task just learned.
  Evaluation(std::vector<int64_t> task_sizes, int64_t task);

  // A batch: labels (b), int64 in 0 .. n_seen - 1; scores (b, n_seen), any floating type, higher is
  // better; or of more classes, of which one not seen is a wrong prediction. The task that was
  // inferred (b), int64, where there is one. The device of the scores computes; the host does not
  // wait for it. Equal scores rank by class, lowest first. ValueError for shapes or labels that do
  // not fit.
  void add(const at::Tensor& labels, const at::Tensor& scores, const at::Tensor& task = {});

  // Copies of these of another evaluation after the same task: all that has been added. ValueError
  // for what no evaluation holds.
  void restore(const at::Tensor& labels, const at::Tensor& records, const at::Tensor& confidences);

  int64_t task() const { return task_; }
  // First class of each task 0 .. task, then the number of classes seen.
  const std::vector<int64_t>& first_class() const { return first_class_; }
  int64_t seen_classes() const { return first_class_.back(); }
  int64_t count() const { return count_; }  // images added

  // The queries below throw NumericalError if any score was NaN or infinite.
  at::Tensor labels() const;       // (count), int64, host
  at::Tensor predictions() const;  // (count), int64, host: the class with the highest score

  double top1() const;                   // A_t: share of right predictions over all images
  double top5() const;                   // label among the 5 best; NaN with 5 classes or fewer
  std::vector<double> per_task() const;  // top-1 on the images of each task 0 .. task
  double old_classes() const;            // top-1 on the images of earlier tasks (NaN in task 0)
  double new_classes() const;            // top-1 on the images of this task
  double task_id() const;                // predicted class lies in the image's task
  double within_task() const;            // best class of the image's own task is the right one
  double inferred_task() const;          // task inferred is the image's; NaN where none was

  // What is kept of each image: columns prediction, best class within the task, rank of the label,
  // whether all its scores were finite, task inferred (-1: none). (count, 5), int64, host.
  const at::Tensor& records() const;
  // (count), float32, host: the softmax of all its scores at the prediction.
  at::Tensor confidences() const;

 private:
  // Scores have so many columns, or more: classes beyond those seen are of no task.
  void know_columns(int64_t columns);

  std::vector<int64_t> first_class_;
  int64_t task_;
  int64_t count_ = 0;
  at::Tensor task_of_class_;  // (columns of the scores), on their device; -1: not seen
  std::vector<at::Tensor> labels_, confidences_;
  // One tensor per batch until a query joins them.
  mutable std::vector<at::Tensor> records_;
};

// A run of T tasks.
struct Summary {
  at::Tensor accuracy_matrix;     // (T, T) float64, [i][j]: on task j after task i; NaN for j > i
  std::vector<double> accuracy;   // A_t after each task, over all its test images
  std::vector<double> task_mean;  // mean of row t of the matrix: tasks weigh equally
  double final_accuracy = 0;      // A_T
  double average_accuracy = 0;    // mean of the A_t
  double final_task_mean = 0;     // LoRAC-IPC's "Avg. Acc"
  double average_task_mean = 0;   // mean of task_mean
  double forgetting = 0;          // of the matrix, see below
  double backward_transfer = 0;
};

// evaluations[t]: the test after task t, for t = 0 .. T - 1. ValueError if there is none, one is
// out of order, or they disagree about the tasks.
Summary summarize(const std::vector<Evaluation>& evaluations);

// Of an accuracy matrix a (T, T), over the tasks k < T - 1; 0 for T = 1.
//   forgetting:        mean of max_{k <= i < T - 1} a[i][k] - a[T-1][k]
//   backward transfer: mean of a[T-1][k] - a[k][k]
double forgetting(const at::Tensor& accuracy_matrix);
double backward_transfer(const at::Tensor& accuracy_matrix);

}  // namespace ntkcl::stats
