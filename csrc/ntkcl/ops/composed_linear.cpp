#include "ntkcl/ops/composed_linear.h"

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/wanted.h"

namespace ntkcl::ops {
namespace {

using Optional = std::optional<at::Tensor>;
using Outputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "composed_linear";

// ---- Checks ----

void check_scales(std::string_view name, const std::vector<double>& scales,
                  const c10::SymInt& matrices) {
  NTKCL_OP_CHECK(c10::SymInt(static_cast<int64_t>(scales.size())) == matrices, kOp, "expected ",
                 matrices, " numbers in ", name, ", got ", scales.size());
}

void check_modules(const at::Tensor& weight, const LowRankModules& m) {
  check_floating(kOp, "weight", weight);
  check_floating(kOp, "down", m.down);
  NTKCL_OP_CHECK(weight.dim() == 3 && m.down.dim() == 3, kOp,
                 "expected weight (g, out, in) and down (g, in, r), got ", weight.sym_sizes(),
                 " and ", m.down.sym_sizes());
  const c10::SymInt g = weight.sym_size(0), out = weight.sym_size(1), in = weight.sym_size(2);
  const c10::SymInt rank = m.down.sym_size(2);
  check_shape(kOp, "down", m.down, {g, in, rank});
  check_shape(kOp, "up", m.up, {g, rank, out});
  check_like(kOp, "up", m.up, "down", m.down);
  check_scales("scale", m.scale, g);
  const bool old = m.old_down.has_value();
  NTKCL_OP_CHECK(old == m.old_up.has_value() && old == m.omega.has_value(), kOp,
                 "expected old_down, old_up and omega together, or none of them");
  if (old) {
    NTKCL_OP_CHECK(m.omega->dim() == 2, kOp, "expected omega (g, t), got ", m.omega->sym_sizes());
    const c10::SymInt modules = m.omega->sym_size(1);
    check_shape(kOp, "omega", *m.omega, {g, modules});
    check_shape(kOp, "old_down", *m.old_down, {g, in, modules * rank});
    check_shape(kOp, "old_up", *m.old_up, {g, modules * rank, out});
    check_like(kOp, "old_down", *m.old_down, "down", m.down);
    NTKCL_OP_CHECK(!m.old_down->requires_grad() && !m.old_up->requires_grad(), kOp,
                   "expected old_down and old_up that require no gradient: old modules are "
                   "constants");
    check_like(kOp, "old_up", *m.old_up, "down", m.down);
    check_like(kOp, "omega", *m.omega, "down", m.down);
    check_scales("omega_scale", m.omega_scale, g);
  }
}

void check_input(const at::Tensor& x, const at::Tensor& weight) {
  check_floating(kOp, "x", x);
  check_like(kOp, "weight", weight, "x", x);
  const c10::SymInt in = weight.sym_size(2);
  NTKCL_OP_CHECK(x.dim() >= 1 && x.sym_size(-1) == in, kOp, "expected x (..., ", in, "), got ",
                 x.sym_sizes());
}

void check_forward(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                   const LowRankModules& m, const Optional& probe) {
  check_modules(weight, m);
  check_input(x, weight);
  if (bias) {
    check_shape(kOp, "bias", *bias, {weight.sym_size(0) * weight.sym_size(1)});
    check_like(kOp, "bias", *bias, "x", x);
  }
  if (probe) {
    NTKCL_OP_CHECK(probe->sym_sizes() == weight.sym_sizes() ||
                       (probe->dim() == 1 && probe->sym_size(0) == weight.sym_size(0)),
                   kOp, "expected probe (g) or of weight's shape ", weight.sym_sizes(), ", got ",
                   probe->sym_sizes());
    check_like(kOp, "probe", *probe, "down", m.down);
  }
}

// ---- Arithmetic ----

// (g). Made without a host tensor's memory, which fake tensors do not have.
at::Tensor factors_of(const std::vector<double>& scale, const at::Tensor& like) {
  std::vector<at::Tensor> factors;
  factors.reserve(scale.size());
  for (const double value : scale) {
    factors.push_back(at::full({}, value, like.options()));
  }
  return at::stack(factors);
}

// The gradients of matrix j of a group, from the rows x (n, in) and its part of grad (n, out).
class MatrixGradients {
 public:
  MatrixGradients(const LowRankModules& m, int64_t j, const std::array<bool, kGradients>& wanted)
      : down_(m.down[j]), up_(m.up[j]), scale_(m.scale[static_cast<size_t>(j)]) {
    current_ = scale_ != 0 && (wanted[kDown] || wanted[kUp]);
    if (m.omega && m.omega->size(1) > 0) {
      omega_scale_ = m.omega_scale[static_cast<size_t>(j)];
      old_down_ = (*m.old_down)[j];
      old_up_ = (*m.old_up)[j];
      modules_ = m.omega->size(1);
      old_ = omega_scale_ != 0 && wanted[kOmega];
    }
  }

  bool any() const { return current_ || old_; }

  // Whether the dense gradient is cheaper than going around it.
  bool prefers_dense(int64_t rows) const {
    const int64_t in = down_.size(0), out = up_.size(1), rank = down_.size(1);
    const int64_t columns = (current_ ? 2 * rank : 0) + (old_ ? modules_ * rank : 0);
    const int64_t from_dense = in * out * columns;
    return rows * in * out + from_dense < rows * columns * (in + out);
  }

  // G = grad^T x (out, in)
  void from_dense(const at::Tensor& gradient, const ComposedGradients& to, int64_t j) const {
    const at::Tensor g = gradient.to(down_.scalar_type()).t();  // (in, out)
    if (current_) {
      store(to[kDown], j, at::mm(g, up_.t()) * scale_);
      store(to[kUp], j, at::mm(down_.t(), g) * scale_);
    }
    if (old_) {
      store(to[kOmega], j, by_module((at::mm(old_down_.t(), g) * old_up_).sum(1)));
    }
  }

  void from_rows(const at::Tensor& x, const at::Tensor& grad, const ComposedGradients& to,
                 int64_t j) const {
    const auto like_x = [&](const at::Tensor& t) { return t.to(x.scalar_type()); };
    if (current_) {
      store(to[kDown], j, at::mm(x.t(), at::mm(grad, like_x(up_).t())) * scale_);
      store(to[kUp], j, at::mm(at::mm(x, like_x(down_)).t(), grad) * scale_);
    }
    if (old_) {
      const at::Tensor product =
          at::mm(x, like_x(old_down_)) * at::mm(grad, like_x(old_up_).t());  // (n, t*r)
      store(to[kOmega], j, by_module(product.sum(0, false, down_.scalar_type())));
    }
  }

 private:
  static void store(const at::Tensor& to, int64_t j, const at::Tensor& value) {
    if (to.numel() > 0) {  // else it is not wanted
      to[j].copy_(value);
    }
  }
  at::Tensor by_module(const at::Tensor& by_column) const {
    return by_column.view({modules_, -1}).sum(1) * omega_scale_;
  }

  at::Tensor down_, up_, old_down_, old_up_;
  double scale_, omega_scale_ = 0;
  int64_t modules_ = 0;
  bool current_ = false, old_ = false;
};

at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                   const at::Tensor& down, const at::Tensor& up, at::ArrayRef<double> scale,
                   const Optional& old_down, const Optional& old_up, const Optional& omega,
                   at::ArrayRef<double> omega_scale, bool composed, const Optional& probe) {
  const LowRankModules m = low_rank_modules(down, up, scale, old_down, old_up, omega, omega_scale);
  check_forward(x, weight, bias, m, probe);
  const at::Tensor used = composed ? weight : composed_weight(weight, m);
  return at::linear(x, used.flatten(0, 1), bias);
}

Outputs backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                 const at::Tensor& down, const at::Tensor& up, at::ArrayRef<double> scale,
                 const Optional& old_down, const Optional& old_up, const Optional& omega,
                 at::ArrayRef<double> omega_scale, std::array<bool, kGradients> wanted,
                 bool entries) {
  const LowRankModules m = low_rank_modules(down, up, scale, old_down, old_up, omega, omega_scale);
  check_modules(weight, m);
  check_input(x, weight);
  // A backward pass may run inside torch.autocast, which would change the products' type.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t g = weight.size(0), out = weight.size(1);
  const at::Tensor rows = x.flatten(0, -2), drows = grad.flatten(0, -2);
  ComposedGradients to;
  to.fill(unwanted(x));
  if (wanted[kInput]) {
    to[kInput] = at::matmul(grad, weight.flatten(0, 1));
  }
  if (wanted[kWeight]) {
    to[kWeight] = at::empty_like(weight);
  }
  if (wanted[kBias]) {
    to[kBias] = drows.sum(0);
  }
  const auto zeros = [&](ComposedGradient kind, const at::Tensor& like) {
    to[kind] = wanted[kind] ? at::zeros_like(like) : unwanted(like);
  };
  zeros(kDown, down);
  zeros(kUp, up);
  zeros(kOmega, omega.value_or(down));
  to[kImportance] = !wanted[kImportance] ? unwanted(down)
                    : entries            ? at::empty(weight.sizes(), down.options())
                                         : at::empty({g}, down.options());
  for (int64_t j = 0; j < g; ++j) {
    const MatrixGradients of(m, j, wanted);
    const at::Tensor own = drows.narrow(1, j * out, out);
    const bool dense = wanted[kWeight] || wanted[kImportance];
    if (dense || (of.any() && of.prefers_dense(rows.size(0)))) {
      const at::Tensor gradient = at::mm(own.t(), rows);
      of.from_dense(gradient, to, j);
      if (wanted[kWeight]) {
        to[kWeight][j].copy_(gradient);
      }
      if (wanted[kImportance]) {
        const at::Tensor of_entries = weight[j] * gradient;  // W_ij G_ij
        to[kImportance][j] = entries ? of_entries : of_entries.abs().mean(down.scalar_type());
      }
    } else if (of.any()) {
      of.from_rows(rows, own, to, j);
    }
  }
  return {to[0], to[1], to[2], to[3], to[4], to[5], to[6]};
}

// ---- Meta ----

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                        const at::Tensor& down, const at::Tensor& up, at::ArrayRef<double> scale,
                        const Optional& old_down, const Optional& old_up, const Optional& omega,
                        at::ArrayRef<double> omega_scale, bool, const Optional& probe) {
  check_forward(x, weight, bias,
                low_rank_modules(down, up, scale, old_down, old_up, omega, omega_scale), probe);
  c10::SymDimVector sizes(x.sym_sizes());
  sizes.back() = weight.sym_size(0) * weight.sym_size(1);
  return at::empty_symint(sizes, x.options());
}

Outputs backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                      const at::Tensor& down, const at::Tensor& up, at::ArrayRef<double> scale,
                      const Optional& old_down, const Optional& old_up, const Optional& omega,
                      at::ArrayRef<double> omega_scale, std::array<bool, kGradients> wanted,
                      bool entries) {
  check_modules(weight, low_rank_modules(down, up, scale, old_down, old_up, omega, omega_scale));
  check_input(x, weight);
  const at::Tensor& of_omega = omega ? *omega : down;
  return {empty_if(wanted[kInput], x.sym_sizes(), x),
          empty_if(wanted[kWeight], weight.sym_sizes(), weight),
          empty_if(wanted[kBias], {grad.sym_size(-1)}, grad),
          empty_if(wanted[kDown], down.sym_sizes(), down),
          empty_if(wanted[kUp], up.sym_sizes(), up),
          empty_if(wanted[kOmega], of_omega.sym_sizes(), of_omega),
          empty_if(wanted[kImportance],
                   entries ? weight.sym_sizes() : weight.sym_sizes().slice(0, 1), down)};
}

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const Optional&, const at::Tensor&,
                           const at::Tensor&, at::ArrayRef<double>, const Optional&,
                           const Optional&, const Optional&, at::ArrayRef<double>, bool,
                           const Optional&);
using Backward = Outputs(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const at::Tensor&, at::ArrayRef<double>, const Optional&, const Optional&,
                         const Optional&, at::ArrayRef<double>, std::array<bool, kGradients>, bool);

}  // namespace

LowRankModules low_rank_modules(const at::Tensor& down, const at::Tensor& up,
                                at::ArrayRef<double> scale, const Optional& old_down,
                                const Optional& old_up, const Optional& omega,
                                at::ArrayRef<double> omega_scale) {
  return {.down = down,
          .up = up,
          .scale = scale.vec(),
          .old_down = old_down,
          .old_up = old_up,
          .omega = omega,
          .omega_scale = omega_scale.vec()};
}

at::Tensor composed_weight(const at::Tensor& weight, const LowRankModules& m) {
  check_modules(weight, m);
  // Torch's checks of operators refuse a `to` that returns its argument.
  const auto to = [](const at::Tensor& t, at::ScalarType type) {
    return t.scalar_type() == type ? t : t.to(type);
  };
  WeightFactors factors{.down = m.down, .up = m.up, .scale = factors_of(m.scale, m.down)};
  if (m.omega) {
    factors.old_down = *m.old_down;
    factors.old_up = *m.old_up;
    factors.omega = *m.omega * factors_of(m.omega_scale, m.down).unsqueeze(1);
  }
  return to(compose_weight(to(weight, m.down.scalar_type()), factors), weight.scalar_type());
}

at::Tensor compose_weight(const at::Tensor& weight, const WeightFactors& factors) {
  // (out, in) = W0 + (scale up)^T down^T
  const auto product_up = [](const at::Tensor& up, const at::Tensor& by_row) {
    return (up * by_row).transpose(1, 2);
  };
  at::Tensor composed = weight;
  if (factors.down.defined()) {
    composed = at::baddbmm(composed, product_up(factors.up, factors.scale.view({-1, 1, 1})),
                           factors.down.transpose(1, 2));
  }
  if (factors.omega.defined() && factors.omega.size(1) > 0) {
    const int64_t rank = factors.old_up.size(1) / factors.omega.size(1);
    const at::Tensor by_row = factors.omega.repeat_interleave(rank, 1).unsqueeze(2);
    composed =
        at::baddbmm(composed, product_up(factors.old_up, by_row), factors.old_down.transpose(1, 2));
  }
  return composed;
}

at::Tensor composed_linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                           const LowRankModules& m, bool composed, const Optional& probe) {
  static const auto op = find_operator<Forward>(kOp);
  return op.call(x, weight, bias, m.down, m.up, m.scale, m.old_down, m.old_up, m.omega,
                 m.omega_scale, composed, probe);
}

ComposedGradients composed_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                           const at::Tensor& weight, const LowRankModules& m,
                                           const std::array<bool, kGradients>& wanted,
                                           bool entries) {
  static const auto op = find_operator<Backward>("composed_linear_backward");
  auto [dx, dweight, dbias, ddown, dup, domega, importance] =
      op.call(grad, x, weight, m.down, m.up, m.scale, m.old_down, m.old_up, m.omega, m.omega_scale,
              wanted, entries);
  return {dx, dweight, dbias, ddown, dup, domega, importance};
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("composed_linear", &forward_meta);
  m.impl("composed_linear_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("composed_linear", &forward);
  m.impl("composed_linear_backward", &backward);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("composed_linear", &forward);
  m.impl("composed_linear_backward", &backward);
}

}  // namespace ntkcl::ops
