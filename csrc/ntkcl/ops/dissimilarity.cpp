#include "ntkcl/ops/dissimilarity.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <limits>

#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/unit_rows.h"

// The matrices of similarities are small (a batch and as many old rows), so their gradient is made
// with the loss: the logarithms' sums are there then.
namespace ntkcl::ops {
namespace {

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "dissimilarity";
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

void check_labels(const char* name, const at::Tensor& labels, const at::Tensor& rows) {
  NTKCL_OP_CHECK_TYPE(labels.scalar_type() == at::kLong, kOp, "expected ", name, " of int64, got ",
                      labels.scalar_type());
  check_shape(kOp, name, labels, {rows.sym_size(0)});
  NTKCL_OP_CHECK(labels.device() == rows.device(), kOp, "expected ", name, " on features' device ",
                 rows.device(), ", got ", labels.device());
}

void check_forward(const at::Tensor& features, const at::Tensor& labels, const at::Tensor& old,
                   const at::Tensor& old_labels, std::string_view kind, double temperature) {
  check_floating(kOp, "features", features);
  NTKCL_OP_CHECK(features.dim() == 2, kOp, "expected features (B, D), got ", features.sym_sizes());
  check_like(kOp, "old", old, "features", features);
  NTKCL_OP_CHECK(old.dim() == 2 && old.sym_size(1) == features.sym_size(1), kOp,
                 "expected old (R, ", features.sym_size(1), "), got ", old.sym_sizes());
  check_labels("labels", labels, features);
  check_labels("old_labels", old_labels, old);
  NTKCL_OP_CHECK(kind == "release" || kind == "infonce", kOp,
                 "expected kind 'release' or 'infonce', got '", kind, "'");
  NTKCL_OP_CHECK(temperature > 0, kOp, "expected a temperature above 0, got ", temperature);
}

void check_backward(const at::Tensor& grad, const at::Tensor& unit, const at::Tensor& scale,
                    const at::Tensor& pull) {
  const char* op = "dissimilarity_backward";
  check_floating(op, "grad", grad);
  check_shape(op, "grad", grad, {});
  NTKCL_OP_CHECK(unit.dim() == 2, op, "expected unit (n, D), got ", unit.sym_sizes());
  const c10::SymInt n = unit.sym_size(0);
  check_like(op, "scale", scale, "unit", unit);
  check_shape(op, "scale", scale, {n, 1});
  check_like(op, "pull", pull, "unit", unit);
  check_shape(op, "pull", pull, {n, n});
}

// A loss and its gradient by S, (n, n).
struct ByEntry {
  at::Tensor loss, grad;
};

// exp(x - log_sum) of `entries`, 0 elsewhere. Where there is no entry log_sum is minus infinity.
at::Tensor shares(const at::Tensor& x, const at::Tensor& log_sum, const at::Tensor& entries) {
  return at::where(entries, (x - log_sum).exp(), 0.0);
}

at::Tensor log_sum(const at::Tensor& x, const at::Tensor& entries, at::IntArrayRef dims) {
  return at::logsumexp(at::where(entries, x, kMinusInfinity), dims, /*keepdim=*/true);
}

ByEntry release_loss(const at::Tensor& s, const at::Tensor& positive, const at::Tensor& others) {
  // One logarithm over all ordered positive pairs. No branch waits for the device.
  const at::Tensor of_pairs = log_sum(s, positive, {0, 1}), of_rows = log_sum(s, others, {1});
  const auto n = static_cast<double>(s.size(0));
  const at::Tensor grad = shares(s, of_pairs, positive) - shares(s, of_rows, others) / n;
  const at::Tensor any = positive.any();
  return {at::where(any, of_pairs.squeeze() - of_rows.mean(), 0.0), at::where(any, grad, 0.0)};
}

ByEntry infonce_loss(const at::Tensor& s, const at::Tensor& positive, const at::Tensor& others,
                     int64_t batch) {
  const at::Tensor of_rows = log_sum(s, others, {1});  // (n, 1)
  const at::Tensor p = positive.to(s.scalar_type());
  const at::Tensor count = p.sum(1, /*keepdim=*/true);
  at::Tensor anchor = count.gt(0).to(s.scalar_type());  // 1 for anchors with a positive
  anchor.narrow(0, batch, s.size(0) - batch).zero_();
  const at::Tensor weight = anchor / anchor.sum().clamp_min(1);
  const at::Tensor p_mean = p / count.clamp_min(1);
  // A row without others is no anchor, and its sum of logarithms is no number.
  const at::Tensor per_row = of_rows - (s * p_mean).sum(1, /*keepdim=*/true);
  const at::Tensor kept = at::where(anchor.gt(0), per_row * weight, 0.0);
  return {kept.sum(), (shares(s, of_rows, others) - p_mean) * weight};
}

FourTensors forward(const at::Tensor& features, const at::Tensor& labels, const at::Tensor& old,
                    const at::Tensor& old_labels, std::string_view kind, double temperature) {
  check_forward(features, labels, old, old_labels, kind, temperature);
  const UnitRows rows =
      unit_rows(at::cat({features, old}).to(compute_type(features.scalar_type())));
  const at::Tensor& z = rows.unit;
  const at::Tensor y = at::cat({labels, old_labels});
  const at::Tensor s = at::mm(z, z.t()) / temperature;
  const at::Tensor others = at::eye(z.size(0), z.options()).eq(0);
  const at::Tensor positive = y.unsqueeze(0).eq(y.unsqueeze(1)).logical_and(others);
  const ByEntry found = kind == "release" ? release_loss(s, positive, others)
                                          : infonce_loss(s, positive, others, labels.size(0));
  // S_ij and S_ji are both products of Z_i and Z_j.
  const at::Tensor pull = (found.grad + found.grad.t()) / temperature;
  return {found.loss.to(features.scalar_type()), z, rows.scale, pull};
}

FourTensors forward_meta(const at::Tensor& features, const at::Tensor& labels,
                         const at::Tensor& old, const at::Tensor& old_labels, std::string_view kind,
                         double temperature) {
  check_forward(features, labels, old, old_labels, kind, temperature);
  const c10::SymInt n = features.sym_size(0) + old.sym_size(0);
  const auto kept = features.options().dtype(compute_type(features.scalar_type()));
  return {at::empty({}, features.options()), at::empty_symint({n, features.sym_size(1)}, kept),
          at::empty_symint({n, 1}, kept), at::empty_symint({n, n}, kept)};
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& unit, const at::Tensor& scale,
                    const at::Tensor& pull) {
  check_backward(grad, unit, scale, pull);
  // A backward pass may run inside torch.autocast, which would change the products' types.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor dunit = at::mm(pull, unit) * grad.to(unit.scalar_type());
  return unit_rows_backward(dunit, {unit.contiguous(), scale}).to(grad.scalar_type());
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& unit, const at::Tensor& scale,
                         const at::Tensor& pull) {
  check_backward(grad, unit, scale, pull);
  return at::empty_symint(unit.sym_sizes(), grad.options());
}

}  // namespace

Dissimilarity dissimilarity(const at::Tensor& features, const at::Tensor& labels,
                            const at::Tensor& old, const at::Tensor& old_labels,
                            std::string_view kind, double temperature) {
  static const auto op = find_operator<decltype(forward)>(kOp);
  auto [loss, unit, scale, pull] = op.call(features, labels, old, old_labels, kind, temperature);
  return {loss, unit, scale, pull};
}

at::Tensor dissimilarity_backward(const at::Tensor& grad, const at::Tensor& unit,
                                  const at::Tensor& scale, const at::Tensor& pull) {
  static const auto op = find_operator<decltype(backward)>("dissimilarity_backward");
  return op.call(grad, unit, scale, pull);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("dissimilarity", &forward_meta);
  m.impl("dissimilarity_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("dissimilarity", &forward);
  m.impl("dissimilarity_backward", &backward);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("dissimilarity", &forward);
  m.impl("dissimilarity_backward", &backward);
}

}  // namespace ntkcl::ops
