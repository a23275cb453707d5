#include "ntkcl/stats/metrics.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ntkcl/core/error.h"

namespace ntkcl::stats {
namespace {

constexpr const char* kWhere = "evaluation";
constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

enum Column { kPrediction, kWithinTask, kRank, kFinite, kTask, kColumns };

double percentage(const at::Tensor& hits) {
  const int64_t images = hits.numel();
  if (images == 0) {
    return kUndefined;
  }
  return 100.0 * static_cast<double>(hits.sum().item<int64_t>()) / static_cast<double>(images);
}

// Mean of what is defined.
double mean(const std::vector<double>& values) {
  double sum = 0;
  int64_t defined = 0;
  for (const double value : values) {
    if (!std::isnan(value)) {
      sum += value;
      ++defined;
    }
  }
  return defined ? sum / static_cast<double>(defined) : kUndefined;
}

// Better scores than the label's own, and equal ones of lower classes.
at::Tensor rank_of_label(const at::Tensor& labels, const at::Tensor& scores) {
  const at::Tensor column = labels.unsqueeze(1);
  const at::Tensor own = scores.gather(1, column);
  const at::Tensor classes = at::arange(scores.size(1), labels.options());
  const at::Tensor earlier = scores.eq(own).logical_and_(classes.lt(column));
  return scores.gt(own).logical_or_(earlier).sum(1);
}

// One evaluation after each task, all of the same split.
void check_run(const std::vector<Evaluation>& evaluations) {
  constexpr const char* kWhereRun = "summarize";
  NTKCL_CHECK(!evaluations.empty(), kWhereRun, "expected at least one evaluation, got none");
  for (size_t t = 0; t < evaluations.size(); ++t) {
    NTKCL_CHECK(evaluations[t].task() == static_cast<int64_t>(t), kWhereRun,
                "expected the evaluation after task ", t, ", got that after task ",
                evaluations[t].task());
  }
  const std::vector<int64_t>& split = evaluations.back().first_class();
  for (const Evaluation& evaluation : evaluations) {
    const std::vector<int64_t>& first = evaluation.first_class();
    NTKCL_CHECK(std::equal(first.begin(), first.end(), split.begin()), kWhereRun,
                "expected the same tasks throughout, got first classes ", at::IntArrayRef(first),
                " after task ", evaluation.task(), " and ", at::IntArrayRef(split), " at the end");
  }
}

at::Tensor matrix_as_double(const at::Tensor& matrix, const char* where) {
  NTKCL_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.size(0) > 0, where,
              "expected a square accuracy matrix, got shape ", matrix.sizes());
  return matrix.to(at::kCPU, at::kDouble).contiguous();
}

}  // namespace

Evaluation::Evaluation(std::vector<int64_t> task_sizes, int64_t task) : task_(task) {
  NTKCL_CHECK(task >= 0 && task < static_cast<int64_t>(task_sizes.size()), kWhere,
              "expected a task in 0 .. ", static_cast<int64_t>(task_sizes.size()) - 1, ", got ",
              task);
  task_sizes.resize(static_cast<size_t>(task) + 1);
  first_class_ = {0};
  for (const int64_t size : task_sizes) {
    NTKCL_CHECK(size > 0, kWhere, "expected tasks of at least one class, got one of ", size);
    first_class_.push_back(first_class_.back() + size);
  }
  task_of_class_ = at::repeat_interleave(at::tensor(task_sizes));
}

void Evaluation::add(const at::Tensor& labels, const at::Tensor& scores, const at::Tensor& task) {
  NTKCL_CHECK(scores.dim() == 2 && scores.size(1) >= seen_classes() && scores.is_floating_point(),
              kWhere, "expected floating point scores (b, ", seen_classes(), " or more), got ",
              scores.toString(), scores.sizes());
  NTKCL_CHECK(
      !task.defined() ||
          (task.dim() == 1 && task.size(0) == scores.size(0) && task.scalar_type() == at::kLong),
      kWhere, "expected int64 tasks (", scores.size(0), "), got ", task.toString(), task.sizes());
  NTKCL_CHECK(
      labels.dim() == 1 && labels.size(0) == scores.size(0) && labels.scalar_type() == at::kLong,
      kWhere, "expected int64 labels (", scores.size(0), "), got ", labels.toString(),
      labels.sizes());
  if (labels.numel() == 0) {
    return;
  }
  const c10::NoGradGuard no_grad;
  const at::Tensor host_labels = labels.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
  const auto [low, high] = at::aminmax(host_labels);
  NTKCL_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < seen_classes(), kWhere,
              "expected labels in 0 .. ", seen_classes() - 1, ", got ", low.item<int64_t>(), " .. ",
              high.item<int64_t>());

  const at::Tensor targets = labels.to(scores.device());
  task_of_class_ = task_of_class_.to(scores.device());
  know_columns(scores.size(1));
  const at::Tensor inferred =
      task.defined() ? task.to(scores.device()) : at::full_like(targets, -1);
  const at::Tensor elsewhere = task_of_class_.narrow(0, 0, scores.size(1))
                                   .unsqueeze(0)
                                   .ne(task_of_class_.index_select(0, targets).unsqueeze(1));
  const at::Tensor within = scores.masked_fill(elsewhere, -std::numeric_limits<double>::infinity());
  records_.push_back(at::stack({scores.argmax(1), within.argmax(1), rank_of_label(targets, scores),
                                scores.isfinite().all(1).to(at::kLong), inferred},
                               1));
  labels_.push_back(host_labels);
  confidences_.push_back(at::amax(at::softmax(scores, 1), {1}).to(at::kFloat));
  count_ += labels.size(0);
}

void Evaluation::restore(const at::Tensor& labels, const at::Tensor& records,
                         const at::Tensor& confidences) {
  const auto is_int64 = [](const at::Tensor& t) { return t.scalar_type() == at::kLong; };
  NTKCL_CHECK(labels.dim() == 1 && is_int64(labels) && is_int64(records) &&
                  records.sizes() == at::IntArrayRef({labels.size(0), kColumns}),
              kWhere, "expected int64 labels (n) and records (n, ", +kColumns, "), got ",
              labels.toString(), labels.sizes(), " and ", records.toString(), records.sizes());
  NTKCL_CHECK(confidences.sizes() == labels.sizes() && confidences.scalar_type() == at::kFloat,
              kWhere, "expected float32 confidences (", labels.size(0), "), got ",
              confidences.toString(), confidences.sizes());
  const auto inside = [](const at::Tensor& values, int64_t low, int64_t high) {
    return values.ge(low).logical_and(values.lt(high)).all().item<bool>();
  };
  const at::Tensor host = records.cpu();
  const int64_t classes = int64_t{1} << 20;  // more than any run has
  NTKCL_CHECK(
      inside(labels, 0, seen_classes()) && inside(host.select(1, kPrediction), 0, classes) &&
          inside(host.select(1, kWithinTask), 0, seen_classes()) &&
          inside(host.select(1, kRank), 0, classes) && inside(host.select(1, kTask), -1, classes),
      kWhere, "expected records of classes in 0 .. ", seen_classes() - 1);
  labels_ = {labels.cpu()};
  records_ = {host};
  confidences_ = {confidences.cpu()};
  count_ = labels.size(0);
  know_columns(count_ > 0 ? host.select(1, kPrediction).max().item<int64_t>() + 1 : 0);
}

void Evaluation::know_columns(int64_t columns) {
  const int64_t more = columns - task_of_class_.size(0);
  if (more > 0) {
    task_of_class_ = at::cat({task_of_class_, task_of_class_.new_full({more}, -1)});
  }
}

const at::Tensor& Evaluation::records() const {
  if (records_.empty()) {
    records_.push_back(at::empty({0, kColumns}, at::kLong));
  }
  if (records_.size() > 1 || !records_[0].is_cpu()) {
    records_ = {at::cat(records_).cpu()};
  }
  const at::Tensor bad = records_[0].select(1, kFinite).eq(0).nonzero();
  if (bad.numel() > 0) {
    NTKCL_FAIL(NumericalError, kWhere, "expected finite scores, got NaN or infinity for ",
               bad.size(0), " of ", count_, " test images after task ", task_,
               ", first for number ", bad[0][0].item<int64_t>(), " (from 0)");
  }
  return records_[0];
}

at::Tensor Evaluation::labels() const {
  return labels_.empty() ? at::empty({0}, at::kLong) : at::cat(labels_);
}

at::Tensor Evaluation::confidences() const {
  return confidences_.empty() ? at::empty({0}) : at::cat(confidences_).cpu();
}

at::Tensor Evaluation::predictions() const {
  return records().select(1, kPrediction).clone();
}

double Evaluation::top1() const {
  return percentage(records().select(1, kRank).eq(0));
}

double Evaluation::top5() const {
  const at::Tensor ranks = records().select(1, kRank);
  return seen_classes() > 5 ? percentage(ranks.lt(5)) : kUndefined;
}

std::vector<double> Evaluation::per_task() const {
  const at::Tensor hits = records().select(1, kRank).eq(0);
  const at::Tensor labels = this->labels();
  std::vector<double> accuracies;
  for (size_t t = 0; t + 1 < first_class_.size(); ++t) {
    const at::Tensor inside =
        labels.ge(first_class_[t]).logical_and(labels.lt(first_class_[t + 1]));
    accuracies.push_back(percentage(hits.masked_select(inside)));
  }
  return accuracies;
}

double Evaluation::old_classes() const {
  const at::Tensor old = labels().lt(first_class_[static_cast<size_t>(task_)]);
  return percentage(records().select(1, kRank).eq(0).masked_select(old));
}

double Evaluation::new_classes() const {
  return per_task().back();
}

double Evaluation::task_id() const {
  const at::Tensor tasks = task_of_class_.cpu();
  return percentage(tasks.index_select(0, predictions()).eq(tasks.index_select(0, labels())));
}

double Evaluation::within_task() const {
  return percentage(records().select(1, kWithinTask).eq(labels()));
}

double Evaluation::inferred_task() const {
  const at::Tensor inferred = records().select(1, kTask);
  if (count_ == 0 || inferred.lt(0).any().item<bool>()) {
    return kUndefined;
  }
  return percentage(inferred.eq(task_of_class_.cpu().index_select(0, labels())));
}

Summary summarize(const std::vector<Evaluation>& evaluations) {
  check_run(evaluations);
  const auto tasks = static_cast<int64_t>(evaluations.size());
  Summary summary;
  summary.accuracy_matrix = at::full({tasks, tasks}, kUndefined, at::kDouble);
  auto matrix = summary.accuracy_matrix.accessor<double, 2>();
  for (int64_t t = 0; t < tasks; ++t) {
    const Evaluation& evaluation = evaluations[static_cast<size_t>(t)];
    const std::vector<double> row = evaluation.per_task();
    for (int64_t k = 0; k <= t; ++k) {
      matrix[t][k] = row[static_cast<size_t>(k)];
    }
    summary.accuracy.push_back(evaluation.top1());
    summary.task_mean.push_back(mean(row));
  }
  summary.final_accuracy = summary.accuracy.back();
  summary.average_accuracy = mean(summary.accuracy);
  summary.final_task_mean = summary.task_mean.back();
  summary.average_task_mean = mean(summary.task_mean);
  summary.forgetting = forgetting(summary.accuracy_matrix);
  summary.backward_transfer = backward_transfer(summary.accuracy_matrix);
  return summary;
}

double forgetting(const at::Tensor& accuracy_matrix) {
  const at::Tensor values = matrix_as_double(accuracy_matrix, "forgetting");
  const auto a = values.accessor<double, 2>();
  const int64_t last = a.size(0) - 1;
  std::vector<double> lost;
  for (int64_t k = 0; k < last; ++k) {
    double best = a[k][k];
    for (int64_t i = k + 1; i < last; ++i) {
      best = std::max(best, a[i][k]);
    }
    lost.push_back(best - a[last][k]);
  }
  return lost.empty() ? 0.0 : mean(lost);
}

double backward_transfer(const at::Tensor& accuracy_matrix) {
  const at::Tensor values = matrix_as_double(accuracy_matrix, "backward_transfer");
  const auto a = values.accessor<double, 2>();
  const int64_t last = a.size(0) - 1;
  std::vector<double> gained;
  for (int64_t k = 0; k < last; ++k) {
    gained.push_back(a[last][k] - a[k][k]);
  }
  return gained.empty() ? 0.0 : mean(gained);
}

}  // namespace ntkcl::stats
