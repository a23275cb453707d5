#include <ATen/ATen.h>

#include "ntkcl/core/error.h"
#include "ntkcl/optim/gradient_clipping.h"
#include "ntkcl/optim/optimizer.h"
#include "ntkcl/optim/running_mean.h"
#include "ntkcl/optim/schedule.h"
#include "testing.h"

namespace ntkcl::optim {
namespace {

using testing::Approx;

at::Tensor scalar(double value) {
  return at::full({1}, value, at::kDouble);
}

OptimizerOptions plain(const std::string& kind) {
  OptimizerOptions options;
  options.kind = kind;
  options.momentum = 0.5;
  options.weight_decay = 0;
  return options;
}

TEST_CASE("SGD moves by rate times momentum", "[optim]") {
  const at::Tensor weight = scalar(1);
  const auto optimizer = make_optimizer(plain("sgd"), {{"w", {weight}}});
  optimizer->set_learning_rate(0.1);
  const auto gradients = [&](int) { weight.mutable_grad() = scalar(2); };
  optimizer->step(gradients);  // v = 2
  CHECK(weight.item<double>() == Approx(0.8));
  optimizer->step(gradients);  // v = 3
  CHECK(weight.item<double>() == Approx(0.5));
}

TEST_CASE("each kind of optimiser asks for its passes in order", "[optim]") {
  for (const std::string kind : {"sgd", "adam", "adamw", "sam", "sam+"}) {
    const at::Tensor weight = scalar(1);
    const auto optimizer = make_optimizer(plain(kind), {{"w", {weight}}, {"empty", {}}});
    optimizer->set_learning_rate(0.1);
    std::vector<int> passes;
    optimizer->step([&](int pass) {
      CHECK_FALSE(weight.grad().defined());
      passes.push_back(pass);
      weight.mutable_grad() = scalar(1.0 - 2 * pass);
    });
    std::vector<int> expected(static_cast<size_t>(optimizer->passes()));
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = static_cast<int>(i);
    }
    CHECK(passes == expected);
    CHECK(weight.item<double>() != 1);
  }
}

TEST_CASE("an optimiser without parameters steps", "[optim]") {
  for (const std::string kind : {"sgd", "adam", "sam+"}) {
    int calls = 0;
    const auto optimizer = make_optimizer(plain(kind), {});
    optimizer->step([&](int) { ++calls; });
    CHECK(calls == optimizer->passes());
  }
}

TEST_CASE("an unknown kind is refused, also without the option table", "[optim]") {
  const auto message = testing::message_of<ValueError>([] { make_optimizer(plain("lion"), {}); });
  CHECK(message.find("[optimizer] expected 'sgd'") == 0);
}

TEST_CASE("a schedule counts milestones from the first epoch that has the lower rate", "[optim]") {
  ScheduleOptions options;
  options.kind = "multistep";
  options.milestones = {3, 1};
  CHECK(learning_rate_at(options, 1.0, 0, 4) == Approx(1));
  CHECK(learning_rate_at(options, 1.0, 1, 4) == Approx(0.1));
  CHECK(learning_rate_at(options, 1.0, 3, 4) == Approx(0.01));
}

TEST_CASE("clipping scales a long gradient and leaves a short one", "[optim]") {
  const at::Tensor weight = at::zeros({2}, at::kDouble);
  weight.mutable_grad() = at::tensor({3.0, 4.0});
  CHECK(clip_grad_norm_(weight, 10).item<double>() == Approx(5));
  CHECK(weight.grad().norm().item<double>() == Approx(5));
  clip_grad_norm_(weight, 2);
  CHECK(weight.grad().norm().item<double>() == Approx(2));
}

TEST_CASE("a running mean weighs every task the same", "[optim]") {
  const at::Tensor mean = scalar(-100);
  for (int64_t n = 0; n < 4; ++n) {
    running_mean_(mean, scalar(static_cast<double>(n)), n);
  }
  CHECK(mean.item<double>() == Approx(1.5));
}

}  // namespace
}  // namespace ntkcl::optim
