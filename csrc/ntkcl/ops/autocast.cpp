#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/section_cosine.h"

// What torch.autocast does to the arguments: the adapter's middle computes in x's type, so a
// float32 bias is cast to it (once, as autocast keeps casts of parameters); cosines compute in
// float32, as torch's own cosine_similarity does.
namespace ntkcl::ops {
namespace {

using at::autocast::cached_cast;

at::Tensor bias_relu_dropout_autocast(const at::Tensor& x, const at::Tensor& bias,
                                      const std::optional<at::Tensor>& mask,
                                      const std::optional<at::Tensor>& key, double p) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return bias_relu_dropout(x, cached_cast(x.scalar_type(), bias, x.device().type()), mask, key, p);
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
  m.impl("bias_relu_dropout", &bias_relu_dropout_autocast);
  m.impl("section_cosine", &section_cosine_autocast);
}

TORCH_LIBRARY_IMPL(ntkcl, AutocastCUDA, m) {
  m.impl("bias_relu_dropout", &bias_relu_dropout_autocast);
  m.impl("section_cosine", &section_cosine_autocast);
}

}  // namespace ntkcl::ops
