#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace ntkcl::ops {

// An adapter beside a frozen layer (NTK-CL section 2, "channel"; RAA section 2.1), or g of them
// side by side:
//
//   out = [x +] scale (drop(relu(x down_weight^T + down_bias)) up_weight^T + up_bias)
//
//   x      (..., C) float32, float64 or bfloat16; or (g, ..., C)
//   mask   of the hidden units' shape, (..., r) or (g, ..., r), or
//   key    of the counter generator, or neither: as in bias_relu_dropout
//   p      the probability of a hidden unit being dropped, 0 <= p < 1
// Errors: ValueError (shapes, devices, p, both mask and key), TypeError (element types).
struct AdapterWeights {
  at::Tensor down_weight;  // (r, C) of x's type, or (g, r, C)
  at::Tensor down_bias;    // (r), or (g, r)
  at::Tensor up_weight;    // (D, r), or (g, D, r)
  at::Tensor up_bias;      // (D), or (g, D)
  double scale = 1.0;
  bool residual = false;  // adds x; D = C then
};
struct ParallelAdapter {
  at::Tensor out;    // (..., D)
  at::Tensor inner;  // (..., r), the hidden units: all that is kept beside x; no gradient
};
ParallelAdapter parallel_adapter(const at::Tensor& x, const AdapterWeights& weights,
                                 const std::optional<at::Tensor>& mask,
                                 const std::optional<at::Tensor>& key, double p);

// The gradients of x, down_weight, down_bias, up_weight and up_bias; (0) where not wanted. Of
// `weights` the biases are not read. p is 0 where there was no dropout.
constexpr size_t kAdapterGradients = 5;
std::array<at::Tensor, kAdapterGradients> parallel_adapter_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inner,
    const AdapterWeights& weights, double p, const std::array<bool, kAdapterGradients>& wanted);

}  // namespace ntkcl::ops
