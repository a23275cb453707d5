#include "ntkcl/ops/token_mix_prompts.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/residual_layer_norm.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/wanted.h"

// Torch's products and our LayerNorm. The tokens are never copied to take the carried prompts out:
// the weight has columns of zeros for them instead.
namespace ntkcl::ops {
namespace {

using Optional = std::optional<at::Tensor>;
using detail::FourTensors;
using Wanted = std::array<bool, kPromptGradients>;

constexpr const char* kOp = "token_mix_prompts";

// ---- Checks ----

void check_forward(const char* op, const at::Tensor& x, const PromptMixing& m) {
  check_floating(op, "x", x);
  check_like(op, "weight", m.weight, "x", x);
  NTKCL_OP_CHECK(m.weight.dim() == 2, op, "expected weight (P, N), got ", m.weight.sym_sizes());
  const c10::SymInt p = m.weight.sym_size(0), n = m.weight.sym_size(1);
  NTKCL_OP_CHECK(n >= 1, op, "expected weight (P, N) of at least one token, got ",
                 m.weight.sym_sizes());
  NTKCL_OP_CHECK(m.carried == 0 || p == m.carried, op, "expected carried 0 or ", p,
                 ", as many as are made, got ", m.carried);
  NTKCL_OP_CHECK(x.dim() == 3 && x.sym_size(1) == n + m.carried, op, "expected x (B, ",
                 n + m.carried, ", C) of ", n, " tokens and ", m.carried, " prompts, got ",
                 x.sym_sizes());
  check_like(op, "norm_weight", m.norm_weight, "x", x);
  check_shape(op, "norm_weight", m.norm_weight, {x.sym_size(2)});
}

void check_affine(const at::Tensor& x, const PromptMixing& m) {
  check_like(kOp, "norm_bias", m.norm_bias, "x", x);
  check_shape(kOp, "norm_bias", m.norm_bias, {x.sym_size(2)});
  NTKCL_OP_CHECK(m.eps >= 0, kOp, "expected eps >= 0, got ", m.eps);
}

void check_backward(const at::Tensor& grad, const Optional& x_grad, const at::Tensor& x,
                    const MixedPrompts& kept, const PromptMixing& m) {
  const char* op = "token_mix_prompts_backward";
  check_forward(op, x, m);
  const c10::SymInt b = x.sym_size(0), c = x.sym_size(2), p = m.weight.sym_size(0);
  check_like(op, "grad", grad, "x", x);
  check_shape(op, "grad", grad, {b, m.insert ? m.weight.sym_size(1) + p : p, c});
  if (x_grad) {
    check_like(op, "x_grad", *x_grad, "x", x);
    check_same_shape(op, "x_grad", *x_grad, "x", x);
  }
  check_like(op, "mixed", kept.mixed, "x", x);
  check_shape(op, "mixed", kept.mixed, {b, p, c});
}

// ---- Arithmetic ----

// The rest of the tokens, behind the class token and `prompts` prompts.
at::Tensor behind(const at::Tensor& tokens, int64_t prompts) {
  return tokens.narrow(1, 1 + prompts, tokens.size(1) - 1 - prompts);
}

// (P, N + carried), with zeros for the prompts that x carries.
at::Tensor over_all_tokens(const PromptMixing& m) {
  if (m.carried == 0) {
    return m.weight;
  }
  const int64_t p = m.weight.size(0), n = m.weight.size(1);
  return at::cat({m.weight.narrow(1, 0, 1), at::zeros({p, m.carried}, m.weight.options()),
                  m.weight.narrow(1, 1, n - 1)},
                 1);
}

FourTensors forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& norm_weight,
                    const at::Tensor& norm_bias, int64_t carried, double scale, double eps,
                    bool insert) {
  const PromptMixing m{weight, norm_weight, norm_bias, carried, scale, eps, insert};
  check_forward(kOp, x, m);
  check_affine(x, m);
  // Not matmul, which transposes x where the weight requires a gradient.
  const at::Tensor mixed = at::bmm(over_all_tokens(m).expand({x.size(0), -1, -1}), x);
  const ResidualLayerNorm normed =
      residual_layer_norm(mixed, std::nullopt, norm_weight, norm_bias, eps);
  at::Tensor out = normed.out;
  if (carried > 0) {
    out.add_(x.narrow(1, 1, carried), scale);
  }
  if (insert) {
    out = at::cat({x.narrow(1, 0, 1), out, behind(x, carried)}, 1);
  }
  return {out, mixed, normed.mean, normed.scale};
}

FourTensors forward_meta(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                         int64_t carried, double scale, double eps, bool insert) {
  const PromptMixing m{weight, norm_weight, norm_bias, carried, scale, eps, insert};
  check_forward(kOp, x, m);
  check_affine(x, m);
  const c10::SymInt b = x.sym_size(0), c = x.sym_size(2), p = weight.sym_size(0);
  const auto of_rows = x.options().dtype(compute_type(x.scalar_type()));
  return {at::empty_symint({b, insert ? weight.sym_size(1) + p : p, c}, x.options()),
          at::empty_symint({b, p, c}, x.options()), at::empty_symint({b, p}, of_rows),
          at::empty_symint({b, p}, of_rows)};
}

// What of the gradient of x does not go through the mixing: of the tokens that were inserted beside
// the prompts, of the prompts that x carried, and what came from elsewhere. A tensor of its own, to
// be added to; undefined: nothing.
at::Tensor direct_gradient(const at::Tensor& grad, const at::Tensor& of_prompts,
                           const Optional& x_grad, const PromptMixing& m) {
  if (m.insert) {
    const at::Tensor carried = m.carried > 0 ? of_prompts * m.scale : of_prompts.narrow(1, 0, 0);
    const at::Tensor own =
        at::cat({grad.narrow(1, 0, 1), carried, behind(grad, of_prompts.size(1))}, 1);
    return x_grad ? own + *x_grad : own;
  }
  at::Tensor direct = x_grad ? x_grad->clone(at::MemoryFormat::Contiguous) : at::Tensor();
  if (m.carried > 0) {
    if (!x_grad) {
      direct = at::zeros({of_prompts.size(0), m.weight.size(1) + m.carried, of_prompts.size(2)},
                         of_prompts.options());
    }
    direct.narrow(1, 1, m.carried).add_(of_prompts, m.scale);
  }
  return direct;
}

FourTensors backward(const at::Tensor& grad, const Optional& x_grad, const at::Tensor& x,
                     const at::Tensor& mixed, const at::Tensor& mean, const at::Tensor& norm_scale,
                     const at::Tensor& weight, const at::Tensor& norm_weight, int64_t carried,
                     double scale, bool insert, Wanted wanted) {
  const PromptMixing m{weight, norm_weight, {}, carried, scale, 0, insert};
  check_backward(grad, x_grad, x, {{}, mixed, mean, norm_scale}, m);
  // A backward pass may run inside torch.autocast, which would change the products' types.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [want_x, want_weight, want_norm_weight, want_norm_bias] = wanted;
  at::Tensor dx = unwanted(x), dweight = unwanted(x);

  const at::Tensor of_prompts = insert ? grad.narrow(1, 1, weight.size(0)) : grad;
  const ResidualLayerNormGradients normed =
      residual_layer_norm_backward(of_prompts, std::nullopt, mixed, mean, norm_scale, norm_weight,
                                   std::nullopt, want_norm_weight || want_norm_bias);
  const at::Tensor& dmixed = normed.dx;
  if (want_weight) {
    const at::Tensor all = at::bmm(dmixed, x.transpose(1, 2)).sum(0);  // (P, N + carried)
    dweight = carried > 0 ? at::cat({all.narrow(1, 0, 1), behind(all, carried)}, 1) : all;
  }
  if (want_x) {
    const at::Tensor by_token = over_all_tokens(m).t().expand({x.size(0), -1, -1});
    at::Tensor direct = direct_gradient(grad, of_prompts, x_grad, m);
    dx = direct.defined() ? direct.baddbmm_(by_token, dmixed) : at::bmm(by_token, dmixed);
  }
  return {dx, dweight, want_norm_weight ? normed.dweight : unwanted(x),
          want_norm_bias ? normed.dbias : unwanted(x)};
}

FourTensors backward_meta(const at::Tensor& grad, const Optional& x_grad, const at::Tensor& x,
                          const at::Tensor& mixed, const at::Tensor& mean,
                          const at::Tensor& norm_scale, const at::Tensor& weight,
                          const at::Tensor& norm_weight, int64_t carried, double scale, bool insert,
                          Wanted wanted) {
  check_backward(grad, x_grad, x, {{}, mixed, mean, norm_scale},
                 {weight, norm_weight, {}, carried, scale, 0, insert});
  return {empty_if(wanted[0], x.sym_sizes(), x), empty_if(wanted[1], weight.sym_sizes(), x),
          empty_if(wanted[2], norm_weight.sym_sizes(), x),
          empty_if(wanted[3], norm_weight.sym_sizes(), x)};
}

}  // namespace

MixedPrompts token_mix_prompts(const at::Tensor& x, const PromptMixing& m) {
  static const auto op = find_operator<decltype(forward)>(kOp);
  auto [out, mixed, mean, scale] =
      op.call(x, m.weight, m.norm_weight, m.norm_bias, m.carried, m.scale, m.eps, m.insert);
  return {out, mixed, mean, scale};
}

std::array<at::Tensor, kPromptGradients> token_mix_prompts_backward(
    const at::Tensor& grad, const Optional& x_grad, const at::Tensor& x, const MixedPrompts& kept,
    const PromptMixing& m, const Wanted& wanted) {
  static const auto op = find_operator<decltype(backward)>("token_mix_prompts_backward");
  auto [dx, dweight, dnorm_weight, dnorm_bias] =
      op.call(grad, x_grad, x, kept.mixed, kept.mean, kept.norm_scale, m.weight, m.norm_weight,
              m.carried, m.scale, m.insert, wanted);
  return {dx, dweight, dnorm_weight, dnorm_bias};
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("token_mix_prompts", &forward_meta);
  m.impl("token_mix_prompts_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("token_mix_prompts", &forward);
  m.impl("token_mix_prompts_backward", &backward);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("token_mix_prompts", &forward);
  m.impl("token_mix_prompts_backward", &backward);
}

}  // namespace ntkcl::ops
