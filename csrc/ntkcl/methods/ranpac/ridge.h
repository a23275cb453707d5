#pragma once

#include <ATen/core/Tensor.h>

// Ridge regression of RanPAC (McDonnell et al., arXiv 2307.02251), in float64.
namespace ntkcl::methods::ranpac {

// Of 1e-8, 1e-7 .. 1e8 the parameter whose regression on rows (m, M) and targets (m, n) has the
// smallest squared error on held-out rows (k, M) and targets (k, n). NumericalError for rows that
// are not finite.
double best_ridge(const at::Tensor& rows, const at::Tensor& targets, const at::Tensor& held_rows,
                  const at::Tensor& held_targets);

struct RidgeSolution {
  at::Tensor weights;  // (M, n)
  double ridge = 0;
};
// (G + lambda I)^-1 C: gram (M, M), class_sums (M, n), ridge > 0. Where rounding leaves the sum not
// positive definite, lambda is multiplied by ten until it is. NumericalError for sums that are not
// finite.
RidgeSolution solve_ridge(const at::Tensor& gram, const at::Tensor& class_sums, double ridge);

}  // namespace ntkcl::methods::ranpac
