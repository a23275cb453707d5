#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace ntkcl::ops {

// NTK-CL's L_orth over rows at unit length, x^ = x / max(|x|, 1e-12) (section 5). What comes from
// the old classes is constant while a task trains.
//
//   x  (B, D) float32, float64 or bfloat16;  ->  a scalar of its type
// Errors: ValueError (shapes, devices), TypeError (element types).

// Corrected (section 8.3): how much of x^ lies in the old subspace, mean_b |x^_b basis|^2.
//   basis  (D, k) of x's type, orthonormal columns
at::Tensor projection_energy(const at::Tensor& x, const at::Tensor& basis);

// As released: sum over b of x^_b . direction. With direction 1 - U U^T 1 it is the sum of all
// entries of x^ - U U^T x^, signed.
//   direction  (D) of x's type
at::Tensor signed_projection(const at::Tensor& x, const at::Tensor& direction);

// The gradients of x and of the second argument, (0) where not wanted. grad is a scalar.
std::tuple<at::Tensor, at::Tensor> projection_energy_backward(const at::Tensor& grad,
                                                              const at::Tensor& x,
                                                              const at::Tensor& basis,
                                                              std::array<bool, 2> wanted);
std::tuple<at::Tensor, at::Tensor> signed_projection_backward(const at::Tensor& grad,
                                                              const at::Tensor& x,
                                                              const at::Tensor& direction,
                                                              std::array<bool, 2> wanted);

}  // namespace ntkcl::ops
