#pragma once

#include <ATen/core/Tensor.h>

// What NTK-CL's losses need of the old classes, constant while a task trains (section 5). The
// losses themselves are operators: ops/dissimilarity.h, ops/projection.h.
namespace ntkcl::methods::ntk_cl {

// The first min(limit, rank) left singular vectors of rows^T, that is of the D x n matrix whose
// columns are the unit rows of `prototypes` (n, D); rank counts singular values above 1e-4.
// Returns (D, k), in float64's accuracy and the prototypes' dtype.
at::Tensor old_basis(const at::Tensor& prototypes, int64_t limit);

// L_orth as released: the sum of all entries of x^ - U U^T x^ is x^ . w with w = 1 - U U^T 1 (D).
// An empty basis gives ones.
at::Tensor signed_direction(const at::Tensor& basis);

}  // namespace ntkcl::methods::ntk_cl
