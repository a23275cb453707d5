#include "ntkcl/methods/lorac_ipc/importance.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ntkcl/core/error.h"

namespace ntkcl::methods::lorac_ipc {
namespace {

constexpr const char* kWhere = "importance";

// k of the specification.
int64_t count_to_freeze(const std::vector<double>& scores, const Selection& selection) {
  const int64_t counted = selection.of_new ? static_cast<int64_t>(scores.size()) -
                                                 std::count(scores.begin(), scores.end(), 0.0)
                                           : static_cast<int64_t>(scores.size());
  return static_cast<int64_t>(std::floor(static_cast<double>(counted) * selection.threshold));
}

// Which matrices freeze, by their places in `scores`.
std::vector<size_t> chosen_exactly(const std::vector<double>& scores, int64_t k) {
  std::vector<size_t> places;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > 0) {
      places.push_back(i);
    }
  }
  std::stable_sort(places.begin(), places.end(),
                   [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  places.resize(std::min(places.size(), static_cast<size_t>(k)));
  return places;
}

std::vector<size_t> chosen_as_released(const std::vector<double>& scores, int64_t k) {
  NTKCL_CHECK(k > 0, kWhere, "the released selection cannot freeze 0 matrices: expected a larger ",
              "threshold, or selection = exact");
  std::vector<double> sorted = scores;
  std::sort(sorted.rbegin(), sorted.rend());
  const double cut = sorted[static_cast<size_t>(k) - 1];
  std::vector<size_t> places;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] >= cut) {
      places.push_back(i);
    }
  }
  return places;
}

}  // namespace

ImportanceAverage::ImportanceAverage(double mean_decay, double uncertainty_decay, bool plain,
                                     const at::TensorOptions& like)
    : mean_decay_(mean_decay),
      uncertainty_decay_(uncertainty_decay),
      plain_(plain),
      mean_(at::zeros({0}, like)),
      uncertainty_(at::zeros({0}, like)) {}

void ImportanceAverage::add(const at::Tensor& importance) {
  const at::NoGradGuard no_grad;
  if (steps_ == 0) {
    mean_ = at::zeros_like(importance);
    uncertainty_ = at::zeros_like(importance);
  }
  const double k = static_cast<double>(++steps_);
  const double a = plain_ ? (k - 1) / k : mean_decay_, b = plain_ ? a : uncertainty_decay_;
  mean_.mul_(a).add_(importance, 1 - a);
  uncertainty_.mul_(b).add_((importance - mean_).abs_(), 1 - b);
}

at::Tensor ImportanceAverage::score() const {
  return mean_ * uncertainty_;
}

void ImportanceAverage::visit_state(const std::string& prefix, const StateVisitor& visitor) {
  at::Tensor steps = at::full({1}, steps_, at::kLong);
  visitor(prefix + "mean", mean_);
  visitor(prefix + "uncertainty", uncertainty_);
  visitor(prefix + "steps", steps);
  NTKCL_CHECK(steps.numel() == 1, "state", prefix, "steps: expected one number, got ",
              steps.sizes());
  steps_ = steps.item<int64_t>();
  NTKCL_CHECK(
      mean_.sizes() == uncertainty_.sizes() && steps_ >= 0 && (steps_ > 0) == (mean_.numel() > 0),
      "state", prefix, "*: expected mean and uncertainty of one shape, empty after no step, got ",
      mean_.sizes(), " and ", uncertainty_.sizes(), " after ", steps_, " steps");
}

at::Tensor freeze_important(const at::Tensor& mask, const at::Tensor& score,
                            const Selection& selection) {
  NTKCL_CHECK(mask.sizes() == score.sizes(), kWhere, "expected a mask of the score's shape ",
              score.sizes(), ", got ", mask.sizes());
  NTKCL_CHECK(0 <= selection.threshold && selection.threshold <= 1, kWhere,
              "expected a threshold from 0 to 1, got ", selection.threshold);
  NTKCL_CHECK(selection.rule == "exact" || selection.rule == "release", kWhere,
              "expected the rule exact or release, got '", selection.rule, "'");
  at::Tensor next = mask.clone(at::MemoryFormat::Contiguous);
  if (selection.threshold == 0) {
    return next;
  }
  // A frozen matrix scores 0, whatever was computed for it.
  const at::Tensor free =
      at::where(mask > 0, score.to(mask.device()), 0).to(at::kCPU, at::kDouble).contiguous();
  if (!free.isfinite().all().item<bool>()) {
    NTKCL_FAIL(NumericalError, kWhere, "expected finite scores, got ", free.min().item<double>(),
               " to ", free.max().item<double>());
  }
  const double* values = free.const_data_ptr<double>();
  const std::vector<double> scores(values, values + free.numel());
  const int64_t k = count_to_freeze(scores, selection);
  for (const size_t place :
       selection.rule == "release" ? chosen_as_released(scores, k) : chosen_exactly(scores, k)) {
    next.view(-1)[static_cast<int64_t>(place)] = 0;
  }
  return next;
}

}  // namespace ntkcl::methods::lorac_ipc
