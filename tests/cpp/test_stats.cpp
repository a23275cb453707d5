#include <ATen/ATen.h>

#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/stats/drift.h"
#include "ntkcl/stats/metrics.h"
#include "ntkcl/stats/prototypes.h"
#include "testing.h"

namespace ntkcl::stats {
namespace {

using testing::Approx;

// Scores that predict class `predictions[i]` for image i.
Evaluation predicting(int64_t task, const std::vector<int64_t>& labels,
                      const std::vector<int64_t>& predictions) {
  Evaluation evaluation({2, 1}, task);
  evaluation.add(at::tensor(labels),
                 at::one_hot(at::tensor(predictions), task == 0 ? 2 : 3).to(at::kFloat));
  return evaluation;
}

TEST_CASE("a run is summed up in percent", "[stats]") {
  const Evaluation first = predicting(0, {0, 0, 1, 1}, {0, 0, 1, 1});
  const Evaluation last = predicting(1, {0, 0, 1, 1, 2}, {0, 2, 1, 0, 2});
  CHECK(last.top1() == Approx(60));
  CHECK(last.task_id() == Approx(80));
  CHECK(std::isnan(last.top5()));
  const Summary summary = summarize({first, last});
  CHECK(summary.average_accuracy == Approx(80));
  CHECK(summary.final_task_mean == Approx(75));
  CHECK(summary.forgetting == Approx(50));
  CHECK(summary.backward_transfer == Approx(-50));
  CHECK(std::isnan(summary.accuracy_matrix[0][1].item<double>()));
}

TEST_CASE("evaluations that are copied stay apart", "[stats]") {
  Evaluation one = predicting(0, {0}, {0});
  const Evaluation copy = one;
  one.add(at::tensor({1}, at::kLong), at::tensor({1.0f, 0.0f}).unsqueeze(0));
  CHECK(one.top1() == Approx(50));
  CHECK(copy.top1() == Approx(100));
}

TEST_CASE("scores that are not finite are a numerical error", "[stats]") {
  Evaluation evaluation({2}, 0);
  evaluation.add(at::tensor({1}, at::kLong), at::tensor({std::nan(""), 0.0}).unsqueeze(0));
  const auto message = testing::message_of<NumericalError>([&] { evaluation.top1(); });
  CHECK(message.find("[evaluation] expected finite scores") == 0);
}

TEST_CASE("class means name a class without an image", "[stats]") {
  ClassMeans means(4, 2, 1);
  means.add(at::tensor({1.0f, 3.0f}).unsqueeze(1), at::tensor({5, 5}, at::kLong));
  const auto message = testing::message_of<ValueError>([&] { means.result(at::kFloat); });
  CHECK(message.find("none of class 4") != std::string::npos);
  means.add(at::tensor({7.0f}).unsqueeze(1), at::tensor({4}, at::kLong));
  CHECK(at::equal(means.result(at::kFloat), at::tensor({7.0f, 2.0f}).unsqueeze(1)));
}

TEST_CASE("the worked case of RAA's drift", "[stats]") {
  const at::Tensor before = at::tensor({1.0, 0.0, 0.0, 8.0}).view({2, 2});
  const at::Tensor after = at::tensor({1.5, 0.0, 0.0, 7.0}).view({2, 2});
  const at::Tensor old = at::tensor({0.0, 0.0, 3.0, 4.0}).view({2, 2});
  const at::Tensor expected = at::tensor({0.438735, -0.122530, 0.269491, -0.461018}).view({2, 2});
  CHECK(at::allclose(gaussian_drift(before, after, old, 4.0), expected, 0, 1e-6));
}

}  // namespace
}  // namespace ntkcl::stats
