#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::nn {

// Rows of x (B, D) scaled to unit length; a norm below 1e-12 counts as 1e-12.
at::Tensor unit_rows(const at::Tensor& x);

// Cosines of all pairs of rows: x (B, D), weight (n, D) -> (B, n).
at::Tensor cosines(const at::Tensor& x, const at::Tensor& weight);

// Cosine classifier (NTK-CL section 4): sigma * cos(x, w_k). x (B, D), weight (n, D), sigma (1);
// returns (B, n).
at::Tensor cosine_logits(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& sigma);

}  // namespace ntkcl::nn
