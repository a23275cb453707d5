#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::ops {

// y = x Phi(x), Phi the normal distribution: GELU by its definition, not by tanh.
//
//   x   (...) float32, float64 or bfloat16
//   ->  (...) of x's type, contiguous
//
// On the CPU within 8 units in the last place in float32, and within 0.52 of bfloat16, wherever the
// result is above twice the least normal number: negative x keep their relative accuracy, unlike
// x (1 + erf(x)) / 2. Smaller results of bfloat16 may be 0.
// Errors: TypeError (element type).
at::Tensor gelu(const at::Tensor& x);

// dx = grad (Phi(x) + x Phi'(x)), of x's shape and type.
at::Tensor gelu_backward(const at::Tensor& grad, const at::Tensor& x);

namespace detail {
void check_gelu(const at::Tensor& x);
void check_gelu_backward(const at::Tensor& grad, const at::Tensor& x);
}  // namespace detail

}  // namespace ntkcl::ops
