#include "ntkcl/stats/drift.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <vector>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/unit_rows.h"

namespace ntkcl::stats {
namespace {

// Images converted to float64 at a time: bounds the memory, whatever the size of the task.
constexpr int64_t kChunk = 8192;

void check(const char* where, const at::Tensor& before, const at::Tensor& after,
           const at::Tensor& prototypes) {
  NTKCL_CHECK(before.dim() == 2 && before.size(0) > 0 && before.is_floating_point(), where,
              "expected features (n, D) of at least one image, got ", before.toString(),
              before.sizes());
  NTKCL_CHECK(after.sizes() == before.sizes() && after.is_floating_point(), where,
              "expected features after training of shape ", before.sizes(), ", got ",
              after.toString(), after.sizes());
  NTKCL_CHECK(prototypes.dim() == 2 && prototypes.size(1) == before.size(1) &&
                  prototypes.is_floating_point(),
              where, "expected prototypes (k, ", before.size(1), "), got ", prototypes.toString(),
              prototypes.sizes());
}

at::Tensor rows(const at::Tensor& features, int64_t first) {
  const int64_t count = std::min(kChunk, features.size(0) - first);
  return features.narrow(0, first, count).to(at::kDouble);
}

// Squared distances of all pairs of rows, (k, D) and (n, D) -> (k, n).
at::Tensor squared_distances(const at::Tensor& p, const at::Tensor& b) {
  const at::Tensor lengths = p.square().sum(1, true) + b.square().sum(1).unsqueeze(0);
  return at::addmm(lengths, p, b.t(), 1, -2).clamp_min_(0);
}

// |b_i - p_k|^2 over all images, (k, n) float64; of unit-length rows if `unit`.
at::Tensor all_squared_distances(const at::Tensor& prototypes, const at::Tensor& before,
                                 bool unit) {
  const at::Tensor p = prototypes.to(at::kDouble);
  std::vector<at::Tensor> parts;
  for (int64_t first = 0; first < before.size(0); first += kChunk) {
    const at::Tensor b = rows(before, first);
    parts.push_back(unit ? squared_distances(ops::unit_rows(p).unit, ops::unit_rows(b).unit)
                         : squared_distances(p, b));
  }
  return at::cat(parts, 1);
}

// sum_i w_ki (a_i - b_i), (k, D) float64, for weights (k, n) whose rows sum to 1.
at::Tensor weighted_shift(const at::Tensor& weights, const at::Tensor& before,
                          const at::Tensor& after) {
  at::Tensor shift = at::zeros({weights.size(0), before.size(1)}, weights.options());
  for (int64_t first = 0; first < before.size(0); first += kChunk) {
    const at::Tensor moved = rows(after, first) - rows(before, first);
    shift.addmm_(weights.narrow(1, first, moved.size(0)), moved);
  }
  return shift;
}

}  // namespace

at::Tensor section_drift(const at::Tensor& before, const at::Tensor& after,
                         const at::Tensor& prototypes, int64_t section_width, double tau) {
  constexpr const char* kWhere = "section_drift";
  check(kWhere, before, after, prototypes);
  const int64_t width = before.size(1);
  NTKCL_CHECK(section_width >= 1 && width % section_width == 0, kWhere,
              "expected a section width that divides ", width, ", got ", section_width);
  NTKCL_CHECK(tau > 0, kWhere, "expected tau > 0, got ", tau);
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> shifts;
  for (int64_t first = 0; first < width; first += section_width) {
    const auto section = [&](const at::Tensor& x) { return x.narrow(1, first, section_width); };
    const at::Tensor distances =
        all_squared_distances(section(prototypes), section(before), /*unit=*/true);
    const at::Tensor weights = distances.div(-2 * tau * tau).softmax(1);
    shifts.push_back(weighted_shift(weights, section(before), section(after)));
  }
  return at::cat(shifts, 1).to(prototypes.scalar_type());
}

at::Tensor gaussian_drift(const at::Tensor& before, const at::Tensor& after,
                          const at::Tensor& prototypes, double sigma, double floor) {
  constexpr const char* kWhere = "gaussian_drift";
  check(kWhere, before, after, prototypes);
  NTKCL_CHECK(sigma > 0 && floor >= 0, kWhere, "expected sigma > 0 and floor >= 0, got ", sigma,
              " and ", floor);
  const c10::NoGradGuard no_grad;
  const at::Tensor distances = all_squared_distances(prototypes, before, /*unit=*/false);
  const at::Tensor weights = distances.div(-2 * sigma * sigma).exp_().add_(floor);
  const at::Tensor shares = weights / weights.sum(1, /*keepdim=*/true);
  return weighted_shift(shares, before, after).to(prototypes.scalar_type());
}

}  // namespace ntkcl::stats
