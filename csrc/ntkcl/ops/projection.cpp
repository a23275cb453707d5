#include "ntkcl/ops/projection.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>

#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/unit_rows.h"
#include "ntkcl/ops/wanted.h"

namespace ntkcl::ops {
namespace {

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using Wanted = std::array<bool, 2>;

void check_rows(const char* op, const at::Tensor& x) {
  check_floating(op, "x", x);
  NTKCL_OP_CHECK(x.dim() == 2, op, "expected x (B, D), got ", x.sym_sizes());
}

void check_energy(const char* op, const at::Tensor& x, const at::Tensor& basis) {
  check_rows(op, x);
  check_like(op, "basis", basis, "x", x);
  NTKCL_OP_CHECK(basis.dim() == 2 && basis.sym_size(0) == x.sym_size(1), op, "expected basis (",
                 x.sym_size(1), ", k), got ", basis.sym_sizes());
}

void check_signed(const char* op, const at::Tensor& x, const at::Tensor& direction) {
  check_rows(op, x);
  check_like(op, "direction", direction, "x", x);
  check_shape(op, "direction", direction, {x.sym_size(1)});
}

void check_gradient(const char* op, const at::Tensor& grad, const at::Tensor& x) {
  check_like(op, "grad", grad, "x", x);
  check_shape(op, "grad", grad, {});
}

// Dense, in the type of the arithmetic.
at::Tensor computed(const at::Tensor& t) {
  return t.contiguous().to(compute_type(t.scalar_type()));
}

// The energy of no rows is 0.
double rows_at_least_one(const at::Tensor& x) {
  return static_cast<double>(std::max<int64_t>(1, x.size(0)));
}

at::Tensor energy(const at::Tensor& x, const at::Tensor& basis) {
  check_energy("projection_energy", x, basis);
  const at::Tensor within = at::mm(unit_rows(computed(x)).unit, computed(basis));  // (B, k)
  return (within.square().sum() / rows_at_least_one(x)).to(x.scalar_type());
}

at::Tensor energy_meta(const at::Tensor& x, const at::Tensor& basis) {
  check_energy("projection_energy", x, basis);
  return at::empty({}, x.options());
}

at::Tensor signed_sum(const at::Tensor& x, const at::Tensor& direction) {
  check_signed("signed_projection", x, direction);
  return at::mv(unit_rows(computed(x)).unit, computed(direction)).sum().to(x.scalar_type());
}

at::Tensor signed_sum_meta(const at::Tensor& x, const at::Tensor& direction) {
  check_signed("signed_projection", x, direction);
  return at::empty({}, x.options());
}

TwoTensors energy_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& basis,
                           Wanted wanted) {
  const char* op = "projection_energy_backward";
  check_energy(op, x, basis);
  check_gradient(op, grad, x);
  // A backward pass may run inside torch.autocast, which would change the products' types.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const UnitRows rows = unit_rows(computed(x));
  const at::Tensor u = computed(basis);
  // The gradient of the coordinates x^ basis, (B, k).
  const at::Tensor pulled = at::mm(rows.unit, u) * (computed(grad) * (2.0 / rows_at_least_one(x)));
  const auto type = x.scalar_type();
  return {wanted[0] ? unit_rows_backward(at::mm(pulled, u.t()), rows).to(type) : unwanted(x),
          wanted[1] ? at::mm(rows.unit.t(), pulled).to(type) : unwanted(x)};
}

TwoTensors signed_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& direction,
                           Wanted wanted) {
  const char* op = "signed_projection_backward";
  check_signed(op, x, direction);
  check_gradient(op, grad, x);
  const UnitRows rows = unit_rows(computed(x));
  const auto type = x.scalar_type();
  const at::Tensor pulled = (computed(direction) * computed(grad)).expand(x.sizes());
  return {wanted[0] ? unit_rows_backward(pulled, rows).to(type) : unwanted(x),
          wanted[1] ? (rows.unit.sum(0) * computed(grad)).to(type) : unwanted(x)};
}

// Of either: the second argument's shape is all that differs.
TwoTensors empty_gradients(const at::Tensor& x, const at::Tensor& second, Wanted wanted) {
  return {empty_if(wanted[0], x.sym_sizes(), x), empty_if(wanted[1], second.sym_sizes(), x)};
}

TwoTensors energy_backward_meta(const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& basis, Wanted wanted) {
  check_energy("projection_energy_backward", x, basis);
  check_gradient("projection_energy_backward", grad, x);
  return empty_gradients(x, basis, wanted);
}

TwoTensors signed_backward_meta(const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& direction, Wanted wanted) {
  check_signed("signed_projection_backward", x, direction);
  check_gradient("signed_projection_backward", grad, x);
  return empty_gradients(x, direction, wanted);
}

}  // namespace

at::Tensor projection_energy(const at::Tensor& x, const at::Tensor& basis) {
  static const auto op = find_operator<decltype(energy)>("projection_energy");
  return op.call(x, basis);
}

at::Tensor signed_projection(const at::Tensor& x, const at::Tensor& direction) {
  static const auto op = find_operator<decltype(signed_sum)>("signed_projection");
  return op.call(x, direction);
}

TwoTensors projection_energy_backward(const at::Tensor& grad, const at::Tensor& x,
                                      const at::Tensor& basis, Wanted wanted) {
  static const auto op = find_operator<decltype(energy_backward)>("projection_energy_backward");
  return op.call(grad, x, basis, wanted);
}

TwoTensors signed_projection_backward(const at::Tensor& grad, const at::Tensor& x,
                                      const at::Tensor& direction, Wanted wanted) {
  static const auto op = find_operator<decltype(signed_backward)>("signed_projection_backward");
  return op.call(grad, x, direction, wanted);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("projection_energy", &energy_meta);
  m.impl("projection_energy_backward", &energy_backward_meta);
  m.impl("signed_projection", &signed_sum_meta);
  m.impl("signed_projection_backward", &signed_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("projection_energy", &energy);
  m.impl("projection_energy_backward", &energy_backward);
  m.impl("signed_projection", &signed_sum);
  m.impl("signed_projection_backward", &signed_backward);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("projection_energy", &energy);
  m.impl("projection_energy_backward", &energy_backward);
  m.impl("signed_projection", &signed_sum);
  m.impl("signed_projection_backward", &signed_backward);
}

}  // namespace ntkcl::ops
