#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ntkcl/ops/attention.h"
#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/composed_linear.h"
#include "ntkcl/ops/residual_layer_norm.h"
#include "ntkcl/ops/section_cosine.h"

// What torch.autocast does to the arguments: attention, the adapter's middle and a LayerNorm
// compute in the type of qkv, x and the stream, so a float32 gate, bias or weight is cast to it
// (once, as autocast keeps casts of parameters); a composed linear layer computes in autocast's
// type, as torch's own does, and composes its weight in the modules'; cosines compute in float32,
// as torch's cosine_similarity.
namespace ntkcl::ops {
namespace {

using at::autocast::cached_cast;

at::Tensor attention_autocast(const at::Tensor& qkv, int64_t heads,
                              const std::optional<at::Tensor>& gate, int64_t prompts) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto cast = [&](const at::Tensor& t) {
    return cached_cast(qkv.scalar_type(), t, qkv.device().type());
  };
  return attention(qkv, heads, gate ? std::optional(cast(*gate)) : std::nullopt, prompts);
}

at::Tensor bias_relu_dropout_autocast(const at::Tensor& x, const at::Tensor& bias,
                                      const std::optional<at::Tensor>& mask,
                                      const std::optional<at::Tensor>& key, double p) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return bias_relu_dropout(x, cached_cast(x.scalar_type(), bias, x.device().type()), mask, key, p);
}

at::Tensor composed_linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& down,
                                    const at::Tensor& up, at::ArrayRef<double> scale,
                                    const std::optional<at::Tensor>& old_down,
                                    const std::optional<at::Tensor>& old_up,
                                    const std::optional<at::Tensor>& omega,
                                    at::ArrayRef<double> omega_scale, bool composed,
                                    const std::optional<at::Tensor>& probe) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto device = x.device().type();
  const auto cast = [&](const at::Tensor& t) {
    return cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  };
  return composed_linear(cast(x), cast(weight), bias ? std::optional(cast(*bias)) : std::nullopt,
                         low_rank_modules(down, up, scale, old_down, old_up, omega, omega_scale),
                         composed, probe);
}

detail::FourTensors residual_layer_norm_autocast(const at::Tensor& x,
                                                 const std::optional<at::Tensor>& update,
                                                 const at::Tensor& weight, const at::Tensor& bias,
                                                 double eps, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto cast = [&](const at::Tensor& t) {
    return cached_cast(x.scalar_type(), t, x.device().type());
  };
  // An update of bfloat16 is added to float32 as it is.
  const bool as_it_is = !update || update->scalar_type() == at::kBFloat16;
  auto [sum, out, mean, scale] = residual_layer_norm(x, as_it_is ? update : cast(*update),
                                                     cast(weight), cast(bias), eps, dtype);
  return {sum, out, mean, scale};
}

at::Tensor section_cosine_autocast(const at::Tensor& x, const at::Tensor& prototypes,
                                   const at::Tensor& weights) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto device = x.device().type();
  return section_cosine(cached_cast(at::kFloat, x, device),
                        cached_cast(at::kFloat, prototypes, device),
                        cached_cast(at::kFloat, weights, device));
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, AutocastCPU, m) {
  m.impl("attention", &attention_autocast);
  m.impl("bias_relu_dropout", &bias_relu_dropout_autocast);
  m.impl("composed_linear", &composed_linear_autocast);
  m.impl("residual_layer_norm", &residual_layer_norm_autocast);
  m.impl("section_cosine", &section_cosine_autocast);
}

TORCH_LIBRARY_IMPL(ntkcl, AutocastCUDA, m) {
  m.impl("attention", &attention_autocast);
  m.impl("bias_relu_dropout", &bias_relu_dropout_autocast);
  m.impl("composed_linear", &composed_linear_autocast);
  m.impl("residual_layer_norm", &residual_layer_norm_autocast);
  m.impl("section_cosine", &section_cosine_autocast);
}

}  // namespace ntkcl::ops
