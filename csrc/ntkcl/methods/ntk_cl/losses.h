#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// The losses of NTK-CL section 5 beside cross-entropy.
namespace ntkcl::methods::ntk_cl {

// L_dis. Z = the unit rows of [fused (B, D); old (R, D)] with labels y, S = Z Z^T / temperature.
//   "release"  log sum_{i != j, y_i = y_j} exp(S_ij) - mean_i logsumexp_{j != i} S_ij
//   "infonce"  mean over anchors i of the batch that have a positive of
//              logsumexp_{j != i} S_ij - mean_{p in P(i)} S_ip                     (section 8.4)
// Without a positive pair the value and the gradient are 0. Returns a scalar.
at::Tensor dissimilarity(const std::string& kind, const at::Tensor& fused, const at::Tensor& labels,
                         const at::Tensor& old, const at::Tensor& old_labels, double temperature);

// The first min(limit, rank) left singular vectors of rows^T, that is of the D x n matrix whose
// columns are the unit rows of `prototypes` (n, D); rank counts singular values above 1e-4.
// Returns (D, k), in float64's accuracy and the prototypes' dtype.
at::Tensor old_basis(const at::Tensor& prototypes, int64_t limit);

// L_orth as released: the sum of all entries of x^ - U U^T x^ is x^ . w with w = 1 - U U^T 1, a
// constant of the task. `signed_direction` is w (D); an empty basis gives ones.
at::Tensor signed_direction(const at::Tensor& basis);
at::Tensor signed_sum(const at::Tensor& features, const at::Tensor& direction);

// L_orth corrected (section 8.3): mean over the batch of |U^T x^|^2, x the current section (B, C).
at::Tensor projection_energy(const at::Tensor& section, const at::Tensor& basis);

}  // namespace ntkcl::methods::ntk_cl
