#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace ntkcl::ops {

// The third representation of NTK-CL, of the features of its two sub-networks (section 3; attention
// over one token is the identity, so queries and keys take no part):
//
//   out = value_scale drophead(channel weight^T + bias) + channel + patch_scale patch
//
//   channel, patch  (B, D) float32, float64 or bfloat16
//   weight          (D, D) of channel's type
//   bias            (D)
//   head_mask       (B, H) uint8 or bool, 0 where a head is dropped, H a divisor of D; kept heads
//                   are divided by 1 - p. None: no dropout
//   ->              (B, D)
// Errors: ValueError (shapes, devices, p), TypeError (element types).
struct FusionScales {
  double p = 0.0;
  double value = 0.5;
  double patch = 0.1;
};
at::Tensor feature_fusion(const at::Tensor& channel, const at::Tensor& patch,
                          const at::Tensor& weight, const at::Tensor& bias,
                          const std::optional<at::Tensor>& head_mask, const FusionScales& scales);

// The gradients of channel, patch, weight and bias; (0) where not wanted.
constexpr size_t kFusionGradients = 4;
std::array<at::Tensor, kFusionGradients> feature_fusion_backward(
    const at::Tensor& grad, const at::Tensor& channel, const at::Tensor& weight,
    const std::optional<at::Tensor>& head_mask, const FusionScales& scales,
    const std::array<bool, kFusionGradients>& wanted);

}  // namespace ntkcl::ops
