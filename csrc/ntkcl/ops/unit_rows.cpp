#include "ntkcl/ops/unit_rows.h"

#include <ATen/ATen.h>

namespace ntkcl::ops {
namespace {

constexpr double kLeastNorm = 1e-12;

}  // namespace

UnitRows unit_rows(const at::Tensor& x) {
  const at::Tensor norm =
      at::linalg_vector_norm(x, 2, {-1}, /*keepdim=*/true).clamp_min(kLeastNorm);
  return {x / norm, norm.reciprocal()};
}

at::Tensor unit_rows_backward(const at::Tensor& grad, const UnitRows& rows) {
  // Where the norm is clamped, x / 1e-12 is linear in x: nothing is taken off along it.
  const at::Tensor along = (grad * rows.unit).sum(-1, /*keepdim=*/true) *
                           rows.scale.lt(1.0 / kLeastNorm).to(grad.scalar_type());
  return at::addcmul(grad, rows.unit, along, -1).mul_(rows.scale);
}

}  // namespace ntkcl::ops
