#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::nn {

constexpr double kLayerNormEps = 1e-6;  // of timm's vision transformers

// A residual stream and what is still to be added to it. The next LayerNorm adds it in passing,
// which saves a read and a write of the whole stream.
struct Residual {
  at::Tensor stream{};  // (B, T, C)
  at::Tensor update{};  // (B, T, C), of its own type, or undefined: nothing

  // stream + update.
  at::Tensor value() const;
};

// value() and its LayerNorm, in the type of the products that follow.
struct Normalised {
  at::Tensor value, out;
  at::Tensor mean, scale;  // see ops/residual_layer_norm.h
};
Normalised layer_norm(const Residual& x, const at::Tensor& weight, const at::Tensor& bias,
                      at::ScalarType type);

}  // namespace ntkcl::nn
