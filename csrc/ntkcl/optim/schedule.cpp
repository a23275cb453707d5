#include "ntkcl/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "ntkcl/core/error.h"

namespace ntkcl::optim {
namespace {

constexpr const char* kWhere = "schedule";

double cosine(const ScheduleOptions& options, double base, int64_t epoch, int64_t epochs) {
  const double floor = options.min_learning_rate;
  NTKCL_CHECK(floor <= base, kWhere, "expected min_learning_rate <= the learning rate ", base,
              ", got ", floor);
  const auto turn = static_cast<double>(std::max<int64_t>(0, epoch - options.hold_epochs));
  const double angle = std::numbers::pi * turn / static_cast<double>(epochs);
  return floor + (base - floor) * (1 + std::cos(angle)) / 2;
}

double multistep(const ScheduleOptions& options, double base, int64_t epoch) {
  const auto passed = std::count_if(options.milestones.begin(), options.milestones.end(),
                                    [epoch](int64_t milestone) { return milestone <= epoch; });
  return base * std::pow(options.factor, passed);
}

}  // namespace

double learning_rate_at(const ScheduleOptions& options, double base, int64_t epoch,
                        int64_t epochs) {
  NTKCL_CHECK(epoch >= 0 && epoch < epochs, kWhere, "expected an epoch in 0 .. ", epochs - 1,
              ", got ", epoch);
  if (options.kind == "cosine") {
    return cosine(options, base, epoch, epochs);
  }
  if (options.kind == "multistep") {
    return multistep(options, base, epoch);
  }
  NTKCL_CHECK(options.kind == "constant", kWhere,
              "expected 'cosine', 'multistep' or 'constant', got '", options.kind, "'");
  return base;
}

double schedule_learning_rates(Optimizer& optimizer, const ScheduleOptions& options, double base,
                               int64_t epoch, int64_t epochs) {
  const auto& groups = optimizer.groups();
  for (size_t g = 0; g < groups.size(); ++g) {
    const double peak = base * groups[g].learning_rate_scale;
    ScheduleOptions own = options;
    own.min_learning_rate = std::min(options.min_learning_rate, peak);
    optimizer.set_learning_rate(g, learning_rate_at(own, peak, epoch, epochs));
  }
  return learning_rate_at(options, base, epoch, epochs);
}

}  // namespace ntkcl::optim
