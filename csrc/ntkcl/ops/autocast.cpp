#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ntkcl/ops/attention.h"
#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/composed_linear.h"
#include "ntkcl/ops/dissimilarity.h"
#include "ntkcl/ops/feature_fusion.h"
#include "ntkcl/ops/parallel_adapter.h"
#include "ntkcl/ops/projection.h"
#include "ntkcl/ops/residual_layer_norm.h"
#include "ntkcl/ops/section_cosine.h"
#include "ntkcl/ops/token_mix_prompts.h"

// What torch.autocast does to the arguments: attention, an adapter and its middle, prompts and a
// LayerNorm compute in the type of qkv, x and the stream, so a float32 gate, bias or weight is cast
// to it (once, as autocast keeps casts of parameters); a composed linear layer computes in
// autocast's type, as torch's own does, and composes its weight in the modules'; what is made of
// whole images' features, cosines, fusion and losses, computes in float32, as torch's
// cosine_similarity.
namespace ntkcl::ops {
namespace {

using at::autocast::cached_cast;

// A parameter in the type of what it meets.
at::Tensor as_type_of(const at::Tensor& x, const at::Tensor& parameter) {
  return cached_cast(x.scalar_type(), parameter, x.device().type());
}

at::Tensor as_float32(const at::Tensor& x) {
  return cached_cast(at::kFloat, x, x.device().type());
}

at::Tensor attention_autocast(const at::Tensor& qkv, int64_t heads,
                              const std::optional<at::Tensor>& gate, int64_t prompts) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return attention(qkv, heads, gate ? std::optional(as_type_of(qkv, *gate)) : std::nullopt,
                   prompts);
}

at::Tensor bias_relu_dropout_autocast(const at::Tensor& x, const at::Tensor& bias,
                                      const std::optional<at::Tensor>& mask,
                                      const std::optional<at::Tensor>& key, double p) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return bias_relu_dropout(x, as_type_of(x, bias), mask, key, p);
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

detail::FourTensors dissimilarity_autocast(const at::Tensor& features, const at::Tensor& labels,
                                           const at::Tensor& old, const at::Tensor& old_labels,
                                           std::string_view kind, double temperature) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  auto [loss, unit, scale, pull] =
      dissimilarity(as_float32(features), labels, as_float32(old), old_labels, kind, temperature);
  return {loss, unit, scale, pull};
}

at::Tensor feature_fusion_autocast(const at::Tensor& channel, const at::Tensor& patch,
                                   const at::Tensor& weight, const at::Tensor& bias,
                                   const std::optional<at::Tensor>& head_mask, double p,
                                   double value_scale, double patch_scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return feature_fusion(as_float32(channel), as_float32(patch), as_float32(weight),
                        as_float32(bias), head_mask, {p, value_scale, patch_scale});
}

std::tuple<at::Tensor, at::Tensor> parallel_adapter_autocast(
    const at::Tensor& x, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, double scale, bool residual,
    const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& key, double p) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  auto [out, inner] =
      parallel_adapter(x,
                       {as_type_of(x, down_weight), as_type_of(x, down_bias),
                        as_type_of(x, up_weight), as_type_of(x, up_bias), scale, residual},
                       mask, key, p);
  return {out, inner};
}

at::Tensor projection_energy_autocast(const at::Tensor& x, const at::Tensor& basis) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return projection_energy(as_float32(x), as_float32(basis));
}

detail::FourTensors residual_layer_norm_autocast(const at::Tensor& x,
                                                 const std::optional<at::Tensor>& update,
                                                 const at::Tensor& weight, const at::Tensor& bias,
                                                 double eps, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  // An update of bfloat16 is added to float32 as it is.
  const bool as_it_is = !update || update->scalar_type() == at::kBFloat16;
  auto [sum, out, mean, scale] =
      residual_layer_norm(x, as_it_is ? update : as_type_of(x, *update), as_type_of(x, weight),
                          as_type_of(x, bias), eps, dtype);
  return {sum, out, mean, scale};
}

at::Tensor section_cosine_autocast(const at::Tensor& x, const at::Tensor& prototypes,
                                   const at::Tensor& weights) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return section_cosine(as_float32(x), as_float32(prototypes), as_float32(weights));
}

at::Tensor signed_projection_autocast(const at::Tensor& x, const at::Tensor& direction) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return signed_projection(as_float32(x), as_float32(direction));
}

detail::FourTensors token_mix_prompts_autocast(const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& norm_weight,
                                               const at::Tensor& norm_bias, int64_t carried,
                                               double scale, double eps, bool insert) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  auto [out, mixed, mean, norm_scale] =
      token_mix_prompts(x, {as_type_of(x, weight), as_type_of(x, norm_weight),
                            as_type_of(x, norm_bias), carried, scale, eps, insert});
  return {out, mixed, mean, norm_scale};
}

// The same on every device. gelu computes in the type it is given.
void implement(torch::Library& m) {
  m.impl("attention", &attention_autocast);
  m.impl("bias_relu_dropout", &bias_relu_dropout_autocast);
  m.impl("composed_linear", &composed_linear_autocast);
  m.impl("dissimilarity", &dissimilarity_autocast);
  m.impl("feature_fusion", &feature_fusion_autocast);
  m.impl("parallel_adapter", &parallel_adapter_autocast);
  m.impl("projection_energy", &projection_energy_autocast);
  m.impl("residual_layer_norm", &residual_layer_norm_autocast);
  m.impl("section_cosine", &section_cosine_autocast);
  m.impl("signed_projection", &signed_projection_autocast);
  m.impl("token_mix_prompts", &token_mix_prompts_autocast);
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, AutocastCPU, m) {
  implement(m);
}

TORCH_LIBRARY_IMPL(ntkcl, AutocastCUDA, m) {
  implement(m);
}

}  // namespace ntkcl::ops
