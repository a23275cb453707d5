#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace ntkcl::ops {

// Rows as 8-bit floating point numbers (e4m3: 4 bits of exponent, 3 of fraction, up to 448), each
// with a scale that takes its largest entry to 448: what a product of float8 matrices multiplies.
struct Float8Rows {
  at::Tensor values;  // (..., K) float8_e4m3fn
  at::Tensor scale;   // (..., 1) float32; x is about values * scale. 1 for a row of zeros.
};

// x (..., K), float32 or bfloat16. Not differentiable. Halves are rounded to even; a row with an
// entry that is not finite has NaN in it.
//
// Errors: TypeError (the type), ValueError (no dimension), where a gradient is wanted RuntimeError.
Float8Rows float8_rows(const at::Tensor& x);

// Whether at::_scaled_mm multiplies float8 rows there: GPUs from sm_90 on.
bool multiplies_float8(at::Device device);

namespace detail {
bool cuda_multiplies_float8(at::Device device);
void check_float8_rows(const at::Tensor& x);
}  // namespace detail

}  // namespace ntkcl::ops
