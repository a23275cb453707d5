#include "ntkcl/core/options.h"

#include "ntkcl/core/error.h"
#include "testing.h"

namespace ntkcl {
namespace {

using testing::message_of;

struct SampleOptions {
  bool nesterov = false;
  int64_t epochs = 20;
  double momentum = 0.9;
  std::string schedule = "cosine";
  std::vector<int64_t> milestones;
  std::vector<double> weights = {1.0};

  template <class Visitor>
  void visit(Visitor& v) {
    v("nesterov", nesterov, anything(), "Nesterov momentum");
    v("epochs", epochs, at_least(1), "passes over a task");
    v("momentum", momentum, at_least(0).below(1), "momentum of SGD");
    v("schedule", schedule, one_of({"cosine", "constant"}), "learning-rate schedule");
    v("milestones", milestones, above(0), "epochs of a step");
    v("weights", weights, at_least(0).at_most(1), "weight of each section");
  }
};

SampleOptions applied(const OptionMap& values) {
  SampleOptions options;
  apply(values, options, "train");
  return options;
}

template <class ErrorClass>
std::string error_of(const OptionMap& values) {
  return message_of<ErrorClass>([&] { applied(values); });
}

TEST_CASE("keys that are given are set, the others keep their defaults", "[core][options]") {
  const SampleOptions options = applied({{"epochs", int64_t{3}}, {"schedule", "constant"}});
  CHECK(options.epochs == 3);
  CHECK(options.schedule == "constant");
  CHECK(options.momentum == 0.9);
  CHECK_FALSE(options.nesterov);
}

TEST_CASE("a whole number serves where a real one is asked for", "[core][options]") {
  const SampleOptions options =
      applied({{"momentum", int64_t{0}}, {"weights", std::vector<int64_t>{0, 1}}});
  CHECK(options.momentum == 0.0);
  CHECK(options.weights == std::vector<double>{0.0, 1.0});
}

TEST_CASE("a value of the wrong type is a TypeError", "[core][options]") {
  CHECK(error_of<TypeError>({{"epochs", 2.5}}) == "[train] 'epochs': expected int, got float 2.5");
  CHECK(error_of<TypeError>({{"epochs", true}}) == "[train] 'epochs': expected int, got bool true");
  CHECK(error_of<TypeError>({{"momentum", "high"}}) ==
        "[train] 'momentum': expected float, got str 'high'");
  CHECK(error_of<TypeError>({{"milestones", std::vector<double>{1.5}}}) ==
        "[train] 'milestones': expected list[int], got list[float] [1.5]");
}

TEST_CASE("a number outside its range names the range", "[core][options]") {
  CHECK(error_of<ValueError>({{"epochs", int64_t{0}}}) == "[train] 'epochs': expected >= 1, got 0");
  CHECK(error_of<ValueError>({{"momentum", -0.1}}) ==
        "[train] 'momentum': expected >= 0 and < 1, got -0.1");
  CHECK(error_of<ValueError>({{"milestones", std::vector<int64_t>{3, 0}}}) ==
        "[train] 'milestones': expected > 0, got [3, 0]");
}

TEST_CASE("open and closed ends of a range", "[core][options]") {
  CHECK_THROWS_AS(applied({{"momentum", 1.0}}), ValueError);
  CHECK(applied({{"momentum", 0.0}}).momentum == 0.0);
  CHECK(applied({{"weights", std::vector<double>{1.0}}}).weights.front() == 1.0);
  CHECK_THROWS_AS(applied({{"weights", std::vector<double>{1.01}}}), ValueError);
}

TEST_CASE("a number that is not finite is outside every range", "[core][options]") {
  CHECK_THROWS_AS(applied({{"momentum", std::numeric_limits<double>::quiet_NaN()}}), ValueError);
  CHECK_THROWS_AS(applied({{"momentum", std::numeric_limits<double>::infinity()}}), ValueError);
}

TEST_CASE("a name that is no choice lists the choices", "[core][options]") {
  CHECK(error_of<ValueError>({{"schedule", "linear"}}) ==
        "[train] 'schedule': expected one of: cosine, constant, got 'linear'");
}

TEST_CASE("an unknown key names the nearest spelling", "[core][options]") {
  CHECK(error_of<ValueError>({{"momentun", 0.5}}) ==
        "[train] unknown key 'momentun'; did you mean 'momentum'?");
  CHECK(error_of<ValueError>({{"epoch", int64_t{5}}}) ==
        "[train] unknown key 'epoch'; did you mean 'epochs'?");
}

TEST_CASE("an unknown key that resembles none gets no hint", "[core][options]") {
  CHECK(error_of<ValueError>({{"colour", "blue"}}) == "[train] unknown key 'colour'");
}

TEST_CASE("options describe themselves in order, with default, range and doc", "[core][options]") {
  const std::vector<OptionInfo> infos = describe<SampleOptions>();
  REQUIRE(infos.size() == 6);
  const std::vector<std::string> types = {"bool", "int",       "float",
                                          "str",  "list[int]", "list[float]"};
  for (size_t i = 0; i < infos.size(); ++i) {
    CHECK(infos[i].type == types[i]);
  }
  CHECK(infos[2].key == "momentum");
  CHECK(infos[2].doc == "momentum of SGD");
  CHECK(infos[2].allowed.text() == ">= 0 and < 1");
  CHECK(std::get<double>(infos[2].default_value) == 0.9);
  CHECK(infos[0].allowed.text().empty());
  CHECK(infos[3].allowed.choices == std::vector<std::string>{"cosine", "constant"});
}

TEST_CASE("resolved values go back in unchanged", "[core][options]") {
  const SampleOptions options = applied({{"nesterov", true}, {"epochs", int64_t{7}}});
  const OptionMap resolved = values_of(options);
  CHECK(resolved.size() == 6);
  CHECK(values_of(applied(resolved)) == resolved);
  CHECK(std::get<int64_t>(resolved.at("epochs")) == 7);
}

}  // namespace
}  // namespace ntkcl
