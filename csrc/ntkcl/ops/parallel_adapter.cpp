#include "ntkcl/ops/parallel_adapter.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/wanted.h"

// Torch's products around the fused middle. Scale, bias and residual are folded into the products,
// so that what the adapter adds is never written and read again.
namespace ntkcl::ops {
namespace {

using Optional = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using FiveTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Wanted = std::array<bool, kAdapterGradients>;

constexpr const char* kOp = "parallel_adapter";

// ---- Checks ----

// `last` in the place of x's columns.
c10::SymDimVector with_columns(const at::Tensor& x, const c10::SymInt& last) {
  c10::SymDimVector sizes(x.sym_sizes());
  sizes.back() = last;
  return sizes;
}

// Of (g, ...) for g adapters.
c10::SymDimVector in_groups(const at::Tensor& weight, std::initializer_list<c10::SymInt> sizes) {
  c10::SymDimVector all;
  if (weight.dim() == 3) {
    all.push_back(weight.sym_size(0));
  }
  all.append(sizes.begin(), sizes.end());
  return all;
}

void check_products(const char* op, const at::Tensor& x, const at::Tensor& down,
                    const at::Tensor& up, bool residual) {
  check_floating(op, "x", x);
  check_like(op, "down_weight", down, "x", x);
  check_like(op, "up_weight", up, "x", x);
  NTKCL_OP_CHECK(down.dim() == 2 || down.dim() == 3, op,
                 "expected down_weight (r, C), or (g, r, C) for g adapters, got ",
                 down.sym_sizes());
  const bool grouped = down.dim() == 3;
  NTKCL_OP_CHECK(x.dim() >= (grouped ? 2 : 1) && x.sym_size(-1) == down.sym_size(-1) &&
                     (!grouped || x.sym_size(0) == down.sym_size(0)),
                 op, "expected x ", grouped ? "(g, ..., C)" : "(..., C)", " for down_weight ",
                 down.sym_sizes(), ", got ", x.sym_sizes());
  NTKCL_OP_CHECK(up.dim() == down.dim(), op, "expected up_weight ",
                 grouped ? "(g, D, r)" : "(D, r)", " for down_weight ", down.sym_sizes(), ", got ",
                 up.sym_sizes());
  const c10::SymInt out = up.sym_size(-2);
  check_shape(op, "up_weight", up, in_groups(down, {out, down.sym_size(-2)}));
  NTKCL_OP_CHECK(!residual || out == x.sym_size(-1), op, "expected up_weight with ", x.sym_size(-1),
                 " outputs, as x is added to them, got ", out);
}

void check_forward(const at::Tensor& x, const AdapterWeights& w, const Optional& mask,
                   const Optional& key, double p) {
  check_products(kOp, x, w.down_weight, w.up_weight, w.residual);
  check_like(kOp, "down_bias", w.down_bias, "x", x);
  check_like(kOp, "up_bias", w.up_bias, "x", x);
  const c10::SymInt rank = w.down_weight.sym_size(-2);
  check_shape(kOp, "down_bias", w.down_bias, in_groups(w.down_weight, {rank}));
  check_shape(kOp, "up_bias", w.up_bias, in_groups(w.down_weight, {w.up_weight.sym_size(-2)}));
  check_dropout(kOp, mask, key, p, "the hidden units'", with_columns(x, rank), x.device());
}

void check_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inner,
                    const AdapterWeights& w, double p) {
  const char* op = "parallel_adapter_backward";
  check_products(op, x, w.down_weight, w.up_weight, w.residual);
  check_like(op, "grad", grad, "x", x);
  check_shape(op, "grad", grad, with_columns(x, w.up_weight.sym_size(-2)));
  check_like(op, "inner", inner, "x", x);
  check_shape(op, "inner", inner, with_columns(x, w.down_weight.sym_size(-2)));
  check_dropout_probability(op, p);
}

// ---- Arithmetic ----

at::Tensor transposed(const at::Tensor& matrix) {
  return matrix.transpose(-1, -2);
}

// (..., n) -> (M, n), or (g, ..., n) -> (g, M, n).
at::Tensor rows(const at::Tensor& x, bool grouped) {
  const size_t first = grouped ? 1 : 0;
  const auto between = x.sizes().slice(first, static_cast<size_t>(x.dim()) - 1 - first);
  const int64_t m = c10::multiply_integers(between), columns = x.size(-1);
  return grouped ? x.reshape({x.size(0), m, columns}) : x.reshape({m, columns});
}

// base + a b
at::Tensor plus_product(const at::Tensor& base, const at::Tensor& a, const at::Tensor& b) {
  return a.dim() == 3 ? at::baddbmm(base, a, b) : at::addmm(base, a, b);
}

TwoTensors forward(const at::Tensor& x, const at::Tensor& down_weight, const at::Tensor& down_bias,
                   const at::Tensor& up_weight, const at::Tensor& up_bias, double scale,
                   bool residual, const Optional& mask, const Optional& key, double p) {
  check_forward(x, {down_weight, down_bias, up_weight, up_bias, scale, residual}, mask, key, p);
  const bool grouped = down_weight.dim() == 3;
  auto sizes = x.sizes().vec();
  sizes.back() = down_weight.size(-2);
  const at::Tensor x_rows = rows(x.contiguous(), grouped);
  // A product in bfloat16 is rounded: its bias belongs inside, or units near 0 change sides; and
  // x, which may be much larger, outside.
  const bool inside = x.scalar_type() == at::kBFloat16;
  const at::Tensor down = transposed(down_weight);
  const at::Tensor hidden =
      inside ? plus_product(down_bias.unsqueeze(-2), x_rows, down) : at::matmul(x_rows, down);
  const at::Tensor inner = bias_relu_dropout(
      hidden.view(sizes), inside ? at::zeros_like(down_bias) : down_bias, mask, key, p);
  const at::Tensor inner_rows = rows(inner, grouped), up = transposed(up_weight * scale);
  const at::Tensor bias = up_bias.unsqueeze(-2);  // ([g], 1, D)
  at::Tensor out;
  if (residual && !inside) {
    out = at::add(x_rows, bias, scale);
    grouped ? out.baddbmm_(inner_rows, up) : out.addmm_(inner_rows, up);
  } else {
    out = plus_product(bias * scale, inner_rows, up);
    if (residual) {
      out.add_(x_rows);
    }
  }
  sizes.back() = up_weight.size(-2);
  return {out.view(sizes), inner};
}

TwoTensors forward_meta(const at::Tensor& x, const at::Tensor& down_weight,
                        const at::Tensor& down_bias, const at::Tensor& up_weight,
                        const at::Tensor& up_bias, double scale, bool residual,
                        const Optional& mask, const Optional& key, double p) {
  check_forward(x, {down_weight, down_bias, up_weight, up_bias, scale, residual}, mask, key, p);
  return {at::empty_symint(with_columns(x, up_weight.sym_size(-2)), x.options()),
          at::empty_symint(with_columns(x, down_weight.sym_size(-2)), x.options())};
}

FiveTensors backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inner,
                     const at::Tensor& down_weight, const at::Tensor& up_weight, double scale,
                     bool residual, double p, Wanted wanted) {
  check_backward(grad, x, inner, {down_weight, {}, up_weight, {}, scale, residual}, p);
  // A backward pass may run inside torch.autocast, which would change the products' types.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool grouped = down_weight.dim() == 3;
  const auto [want_x, want_down, want_down_bias, want_up, want_up_bias] = wanted;
  // Results of their own, as outputs must not alias.
  at::Tensor dx = unwanted(x), ddown = unwanted(x), ddown_bias = unwanted(x), dup = unwanted(x),
             dup_bias = unwanted(x);
  const at::Tensor grad_rows = rows(grad.contiguous(), grouped), inner_rows = rows(inner, grouped);

  if (want_up) {
    dup = at::matmul(transposed(grad_rows), inner_rows).mul_(scale);
  }
  if (want_up_bias) {
    dup_bias = grad_rows.sum(-2).mul_(scale);
  }
  if (want_x || want_down || want_down_bias) {
    const at::Tensor dinner = at::matmul(grad_rows, up_weight * scale);
    auto [dpre, dbias] =
        bias_relu_dropout_backward(dinner, inner_rows, p, grouped ? down_weight.size(0) : -1);
    if (want_down_bias) {
      ddown_bias = dbias;
    }
    if (want_down) {
      ddown = at::matmul(transposed(dpre), rows(x, grouped));
    }
    if (want_x) {
      dx = residual ? plus_product(grad_rows, dpre, down_weight) : at::matmul(dpre, down_weight);
      dx = dx.view(x.sizes());
    }
  }
  return {dx, ddown, ddown_bias, dup, dup_bias};
}

FiveTensors backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inner,
                          const at::Tensor& down_weight, const at::Tensor& up_weight, double scale,
                          bool residual, double p, Wanted wanted) {
  check_backward(grad, x, inner, {down_weight, {}, up_weight, {}, scale, residual}, p);
  const auto& [want_x, want_down, want_down_bias, want_up, want_up_bias] = wanted;
  return {empty_if(want_x, x.sym_sizes(), x), empty_if(want_down, down_weight.sym_sizes(), x),
          empty_if(want_down_bias, in_groups(down_weight, {down_weight.sym_size(-2)}), x),
          empty_if(want_up, up_weight.sym_sizes(), x),
          empty_if(want_up_bias, in_groups(up_weight, {up_weight.sym_size(-2)}), x)};
}

}  // namespace

ParallelAdapter parallel_adapter(const at::Tensor& x, const AdapterWeights& w, const Optional& mask,
                                 const Optional& key, double p) {
  static const auto op = find_operator<decltype(forward)>(kOp);
  auto [out, inner] = op.call(x, w.down_weight, w.down_bias, w.up_weight, w.up_bias, w.scale,
                              w.residual, mask, key, p);
  return {out, inner};
}

std::array<at::Tensor, kAdapterGradients> parallel_adapter_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inner, const AdapterWeights& w,
    double p, const Wanted& wanted) {
  static const auto op = find_operator<decltype(backward)>("parallel_adapter_backward");
  auto [dx, ddown, ddown_bias, dup, dup_bias] =
      op.call(grad, x, inner, w.down_weight, w.up_weight, w.scale, w.residual, p, wanted);
  return {dx, ddown, ddown_bias, dup, dup_bias};
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("parallel_adapter", &forward_meta);
  m.impl("parallel_adapter_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("parallel_adapter", &forward);
  m.impl("parallel_adapter_backward", &backward);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("parallel_adapter", &forward);
  m.impl("parallel_adapter_backward", &backward);
}

}  // namespace ntkcl::ops
