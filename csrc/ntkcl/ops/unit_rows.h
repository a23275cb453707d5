#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::ops {

// Rows at unit length, x / max(|x|, 1e-12) as torch.nn.functional.normalize, and the way back of a
// gradient, for operators that are made of torch's own. Of float32 or float64.
struct UnitRows {
  at::Tensor unit;   // (..., C)
  at::Tensor scale;  // (..., 1) 1 / max(|x|, 1e-12)
};
UnitRows unit_rows(const at::Tensor& x);

// The gradient of x from that of unit.
at::Tensor unit_rows_backward(const at::Tensor& grad, const UnitRows& rows);

}  // namespace ntkcl::ops
