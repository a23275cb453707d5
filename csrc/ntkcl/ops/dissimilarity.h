#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace ntkcl::ops {

// NTK-CL's L_dis (section 5), a contrastive loss between the features of a batch and kept features
// of old classes. With Z the unit rows of [features; old], y their labels, S = Z Z^T / temperature:
//
//   "release"  log sum_{i != j, y_i = y_j} exp(S_ij) - mean_i logsumexp_{j != i} S_ij
//   "infonce"  mean over rows i of the batch that have a positive of
//              logsumexp_{j != i} S_ij - mean_{p in P(i)} S_ip                     (section 8.4)
//
//   features     (B, D) float32, float64 or bfloat16
//   labels       (B) int64
//   old          (R, D) of features' type
//   old_labels   (R) int64
//   temperature  above 0
//
// Without a positive pair the loss and its gradient are 0. The host never waits for the device.
// Errors: ValueError (shapes, devices, kind, temperature), TypeError (element types).
struct Dissimilarity {
  at::Tensor loss;  // a scalar of features' type
  // What is kept, n = B + R, in the type of the arithmetic; no gradient.
  at::Tensor unit;   // (n, D) Z
  at::Tensor scale;  // (n, 1) 1 / max(|x|, 1e-12)
  at::Tensor pull;   // (n, n): the gradient of Z is pull Z
};
Dissimilarity dissimilarity(const at::Tensor& features, const at::Tensor& labels,
                            const at::Tensor& old, const at::Tensor& old_labels,
                            std::string_view kind, double temperature);

// The gradient of [features; old], (n, D) of grad's type.
at::Tensor dissimilarity_backward(const at::Tensor& grad, const at::Tensor& unit,
                                  const at::Tensor& scale, const at::Tensor& pull);

}  // namespace ntkcl::ops
