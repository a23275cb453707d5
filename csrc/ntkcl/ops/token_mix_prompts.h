#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace ntkcl::ops {

// Prompts mixed over the token axis, and their place in the sequence (NTK-CL section 2, "patch"):
//
//   prompts = LayerNorm(weight x0) norm_weight + norm_bias + scale q
//
// x0 is x without the prompts q that it carries, on places 1 to `carried`. A bias of the mixing
// would be the same for a token's channels, so that the LayerNorm took it away.
//
//   x   (B, N + carried, C) float32, float64 or bfloat16
//   ->  (B, P, C); with `insert` (B, N + P, C): x with the prompts on places 1 to P, q gone
// Errors: ValueError (shapes, devices), TypeError (element types).
struct PromptMixing {
  at::Tensor weight;       // (P, N) of x's type
  at::Tensor norm_weight;  // (C)
  at::Tensor norm_bias;    // (C)
  int64_t carried = 0;     // 0 or P
  double scale = 1.0;
  double eps = 1e-6;
  bool insert = true;
};
struct MixedPrompts {
  at::Tensor out;
  // What is kept beside x; no gradient.
  at::Tensor mixed;             // (B, P, C) weight x0
  at::Tensor mean, norm_scale;  // (B, P), as in residual_layer_norm
};
MixedPrompts token_mix_prompts(const at::Tensor& x, const PromptMixing& mixing);

// The gradients of x, weight, norm_weight and norm_bias; (0) where not wanted. `x_grad`, a gradient
// of x from elsewhere, is added to that of x in passing. Of `mixing` norm_bias and eps are not
// read.
constexpr size_t kPromptGradients = 4;
std::array<at::Tensor, kPromptGradients> token_mix_prompts_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& x_grad, const at::Tensor& x,
    const MixedPrompts& kept, const PromptMixing& mixing,
    const std::array<bool, kPromptGradients>& wanted);

}  // namespace ntkcl::ops
