#include "ntkcl/methods/lorac_ipc/orthogonality.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"

namespace ntkcl::methods::lorac_ipc {
namespace {

// Q^T Q - I, for each block.
at::Tensor gram_minus_identity(const at::Tensor& q) {
  at::Tensor gram = at::bmm(q.transpose(1, 2), q);
  gram.diagonal(0, 1, 2).sub_(1);
  return gram;
}

// Squared Frobenius norm, for each block.
at::Tensor energy(const at::Tensor& x) {
  return x.square().sum({1, 2});
}

}  // namespace

Orthogonality::Orthogonality(at::Tensor old) : old_(std::move(old)) {
  NTKCL_CHECK(old_.dim() == 3, "orthogonality", "old: expected (blocks, in, columns), got ",
              old_.sizes());
  const at::NoGradGuard no_grad;
  among_old_ = energy(gram_minus_identity(old_));
}

Orthogonality::Result Orthogonality::operator()(const at::Tensor& current) const {
  NTKCL_CHECK(
      current.dim() == 3 && current.size(0) == old_.size(0) && current.size(1) == old_.size(1),
      "orthogonality", "current: expected (", old_.size(0), ", ", old_.size(1), ", rank), got ",
      current.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor overlap = at::bmm(old_.transpose(1, 2), current);  // X
  const at::Tensor own = gram_minus_identity(current);                // G
  const at::Tensor values = (among_old_ + 2 * energy(overlap) + energy(own)).sqrt();
  const at::Tensor scale = at::where(values > 0, 2 / values, at::zeros_like(values));
  const at::Tensor pulled = at::bmm(old_, overlap) + at::bmm(current, own);
  return {values, pulled * scale.view({-1, 1, 1})};
}

}  // namespace ntkcl::methods::lorac_ipc
