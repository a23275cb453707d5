#include <ATen/ATen.h>

#include "ntkcl/core/error.h"
#include "ntkcl/train/step_replay.h"
#include "testing.h"

namespace ntkcl::train {
namespace {

using methods::Batch;
using methods::Draw;
using methods::Losses;
using methods::RandomSource;
using methods::StepInfo;

// Stands for a method: which of its steps repeat is all that is asked of it.
class Repeating : public methods::Method {
 public:
  bool repeats(const StepInfo& step) const override { return step.step != once; }
  Losses gradients(const Batch&, const StepInfo&, methods::TaskServices&) override { return {}; }
  std::vector<std::string> stages(const methods::TaskInfo&) const override { return {}; }
  void run_stage(const std::string&, methods::TaskServices&) override {}
  methods::Scores scores(const at::Tensor& images) const override { return {images}; }
  at::Tensor features_of(const at::Tensor& images) const override { return images; }
  void visit_state(const methods::StateVisitor&) override {}

  int64_t once = -1;
};

double first(const at::Tensor& tensor) {
  return tensor.flatten()[0].item<double>();
}

// Four numbers of a step, of which a replay changes all but the first: where it was recorded, what
// came with the batch, what was drawn for the step, and a key.
struct Steps {
  Repeating method{};
  RandomSource source{7};
  at::Tensor parameter = at::zeros({2}, at::kDouble);
  StepReplay replay{
      method,
      source,
      {{"all", {parameter}}},
      /*batch_size=*/4,
      at::kCPU,
      [this](const Batch& batch, const StepInfo& step) { return gradients(batch, step); }};

  Losses gradients(const Batch& batch, const StepInfo& step) {
    RandomSource& random = replay.random();
    const Draw draw{"value", 0, step.step, step.pass};
    const at::Tensor drawn = random.placed(draw, at::kCPU, [](RandomSource&, const Draw& of_step) {
      return at::full({3}, static_cast<double>(100 * of_step.list + of_step.step), at::kDouble);
    });
    const at::Tensor key = random.dropout_key({"key", 0, step.step, step.pass});
    const at::Tensor loss = batch.images.sum() + drawn.sum();
    parameter.mutable_grad() = loss * at::ones({2}, at::kDouble);
    return {{"step", at::full({}, static_cast<double>(step.step), at::kDouble)},
            {"images", batch.images.sum()},
            {"labels", batch.labels.sum()},
            {"drawn", drawn.sum()},
            {"key", key.clone()}};
  }

  std::map<std::string, at::Tensor> step(int64_t number, int64_t pass = 0, int64_t rows = 4) {
    parameter.mutable_grad().reset();
    const Batch batch{at::full({rows, 2}, static_cast<double>(number), at::kDouble),
                      at::full({rows}, number, at::kLong)};
    std::map<std::string, at::Tensor> values;
    for (const auto& [name, value] : replay.gradients(batch, {.step = number, .pass = pass})) {
      values[name] = value.clone();
    }
    return values;
  }

  void check(int64_t number, int64_t recorded_at, int64_t pass = 0, int64_t rows = 4) {
    INFO("step " << number << ", pass " << pass);
    auto values = step(number, pass, rows);
    const double drawn = 3.0 * static_cast<double>(100 * pass + number);
    CHECK(first(values["step"]) == static_cast<double>(recorded_at));
    CHECK(first(values["images"]) == static_cast<double>(2 * rows * number));
    CHECK(first(values["labels"]) == static_cast<double>(rows * number));
    CHECK(first(values["drawn"]) == drawn);
    CHECK(values["key"].item<int64_t>() ==
          source.dropout_key({"key", 0, number, pass}).item<int64_t>());
    CHECK(first(parameter.grad()) == static_cast<double>(2 * rows * number) + drawn);
  }
};

TEST_CASE("a replayed step reads the batch and the draws of its own step", "[replay]") {
  Steps steps;
  for (int64_t s = 0; s < 2; ++s) {
    steps.check(s, s);  // not recorded yet
  }
  for (int64_t s = 2; s < 6; ++s) {
    steps.check(s, 2);
  }
}

TEST_CASE("each pass of a step has a recording of its own", "[replay]") {
  Steps steps;
  for (int64_t s = 0; s < 5; ++s) {
    steps.check(s, std::min<int64_t>(s, 2), 0);
    steps.check(s, std::min<int64_t>(s, 2), 1);
  }
}

TEST_CASE("short batches and steps that do not repeat go the plain way", "[replay]") {
  Steps steps;
  steps.method.once = 0;
  steps.check(0, 0);
  steps.check(1, 1);
  steps.check(2, 2, 0, /*rows=*/3);
  steps.check(3, 3);
  steps.check(4, 4);
  steps.check(5, 4);
  steps.check(6, 6, 0, /*rows=*/1);
  steps.check(7, 4);
}

TEST_CASE("draws from a record are no draws of a replayed step", "[replay]") {
  class Recorded : public RandomSource {
   public:
    using RandomSource::RandomSource;
    std::optional<at::Tensor> recorded(const Draw&) override { return at::ones({2}); }
  };
  Recorded source(1);
  StepDraws draws(source, at::kCPU);
  draws.begin(0);
  const std::string message =
      testing::message_of<ValueError>([&] { draws.recorded({"adapter.dropout"}); });
  CHECK(message.find("[cuda_graph] expected draws by the seed, got 'adapter.dropout'") == 0);
}

}  // namespace
}  // namespace ntkcl::train
