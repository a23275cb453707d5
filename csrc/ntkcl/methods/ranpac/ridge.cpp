#include "ntkcl/methods/ranpac/ridge.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "ntkcl/core/error.h"

namespace ntkcl::methods::ranpac {
namespace {

constexpr const char* kWhere = "ranpac";
constexpr int kLowest = -8, kHighest = 8;  // exponents of the candidates

void check_finite(const at::Tensor& gram) {
  if (!gram.isfinite().all().item<bool>()) {
    NTKCL_FAIL(NumericalError, kWhere, "expected finite features, got NaN or infinity");
  }
}

}  // namespace

double best_ridge(const at::Tensor& rows, const at::Tensor& targets, const at::Tensor& held_rows,
                  const at::Tensor& held_targets) {
  // One eigendecomposition serves all candidates, of the smaller of H H^T and H^T H:
  // (H^T H + lambda I)^-1 H^T = H^T (H H^T + lambda I)^-1.
  const bool dual = rows.size(0) <= rows.size(1);
  const at::Tensor gram = dual ? rows.matmul(rows.t()) : rows.t().matmul(rows);
  const at::Tensor held = dual ? held_rows.matmul(rows.t()) : held_rows;
  const at::Tensor sums = dual ? targets : rows.t().matmul(targets);
  check_finite(gram);
  const auto [values, vectors] = at::linalg_eigh(gram);
  const at::Tensor left = held.matmul(vectors), right = vectors.t().matmul(sums);
  double best = 0, smallest = std::numeric_limits<double>::infinity();
  for (int exponent = kLowest; exponent <= kHighest; ++exponent) {
    const double ridge = std::pow(10.0, exponent);
    const at::Tensor shrunk = right / (values.clamp_min(0) + ridge).unsqueeze(1);
    const double error = (left.matmul(shrunk) - held_targets).square().mean().item<double>();
    if (error < smallest) {
      best = ridge;
      smallest = error;
    }
  }
  return best;
}

RidgeSolution solve_ridge(const at::Tensor& gram, const at::Tensor& class_sums, double ridge) {
  check_finite(gram);
  for (;; ridge *= 10) {
    at::Tensor shifted = gram.clone();
    shifted.diagonal().add_(ridge);
    const auto [factor, failed] = at::linalg_cholesky_ex(shifted);
    if (failed.item<int64_t>() == 0) {
      return {at::cholesky_solve(class_sums, factor), ridge};
    }
  }
}

}  // namespace ntkcl::methods::ranpac
