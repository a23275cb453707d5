#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace ntkcl::ops {

// Low-rank modules of g matrices of one shape that read the same input side by side, as a block's
// q, k and v do. Module i of t is A_i B_i, of rank r; the t old ones are constants but for their
// weights omega, the current one is trained (LoRAC-IPC, arXiv 2504.13407, section 2):
//
//   W_j = W0_j + omega_scale[j] sum_i omega[j, i] A_ji B_ji + scale[j] A_j B_j
//
// A part whose scale is 0 takes no part, and its gradients cost nothing.
struct LowRankModules {
  at::Tensor down;                          // (g, in, r)     A
  at::Tensor up;                            // (g, r, out)    B
  std::vector<double> scale;                // (g)
  std::optional<at::Tensor> old_down = {};  // (g, in, t*r)   A_0 ... A_{t-1}
  std::optional<at::Tensor> old_up = {};    // (g, t*r, out)
  std::optional<at::Tensor> omega = {};     // (g, t)
  std::vector<double> omega_scale = {};     // (g)
};
// From the arguments of the operator's schema.
LowRankModules low_rank_modules(const at::Tensor& down, const at::Tensor& up,
                                at::ArrayRef<double> scale,
                                const std::optional<at::Tensor>& old_down,
                                const std::optional<at::Tensor>& old_up,
                                const std::optional<at::Tensor>& omega,
                                at::ArrayRef<double> omega_scale);

// y = x W^T + bias, the g results of a row side by side:
//
//   x        (..., in) float32, float64 or bfloat16
//   weight   (g, out, in) of x's type: W0, or with `composed` W itself, see compose_weight
//   bias     (g*out)
//   modules  float32 or float64, or of x's type
//   probe    (g) or (g, out, in) of the modules' type, or none; see below
//   ->       (..., g*out) of x's type
//
// x, weight, bias, down, up and omega are differentiable; old modules are constants. For the
// gradients of the modules the cheaper of two ways is taken, with n rows of x and c = 2 r + t r
// columns:
//
//   dA = scale x^T (dy B^T),   dB = scale (x A)^T dy,   domega_i = omega_scale <x A_i, dy B_i^T>
//   or from G = dy^T x, where n c (in + out) exceeds n in out + c in out
//
// Note: what `probe` gets as its gradient is no derivative but mean |W * G|, the importance of each
// matrix (specification section 4), reduced where G is at hand; or W * G of each entry, with its
// sign. Its values are not read.
// Errors: ValueError (shapes, devices), TypeError (element types).
at::Tensor composed_linear(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const LowRankModules& modules,
                           bool composed = false,
                           const std::optional<at::Tensor>& probe = std::nullopt);

// The weights W (m, out, in) of any number of matrices in two batched products: weight (m, out,
// in), modules as above with m for g, and scale (m) and omega (m, t) as tensors of factors; what
// there is not of current or old modules is undefined. No gradient.
struct WeightFactors {
  at::Tensor down{}, up{}, scale{};
  at::Tensor old_down{}, old_up{}, omega{};
};
at::Tensor compose_weight(const at::Tensor& weight, const WeightFactors& factors);
// The same of one group, in the weight's type.
at::Tensor composed_weight(const at::Tensor& weight, const LowRankModules& modules);

enum ComposedGradient { kInput, kWeight, kBias, kDown, kUp, kOmega, kImportance, kGradients };
using ComposedGradients = std::array<at::Tensor, kGradients>;
// grad (..., g*out) -> the gradients that are wanted, in this order; the others are empty.
// `weight` is the composed one; importance (g), or (g, out, in) with `entries`.
ComposedGradients composed_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                           const at::Tensor& weight, const LowRankModules& modules,
                                           const std::array<bool, kGradients>& wanted,
                                           bool entries = false);

}  // namespace ntkcl::ops
