#pragma once

#include "ntkcl/nn/frozen_linear.h"

namespace ntkcl::nn {

constexpr double kLayerNormEps = 1e-6;  // of timm's vision transformers

// A block's MLP(LN2(h)), without the residual, of weights that are never trained:
//
//   fc2(gelu(fc1(layer_norm(h))))        (B, T, C) -> (B, T, C)
//
// h is in the type of the norm, the products in that of fc1, and so is the result.
struct FrozenMlp {
  at::Tensor norm_weight{}, norm_bias{};
  FrozenLinear fc1{}, fc2{};
  // Keep h alone for the backward pass, and compute the activations between anew: a good third less
  // memory of what a block keeps, for a product of fc1 more.
  bool recompute = false;

  at::Tensor operator()(const at::Tensor& hidden) const;
};

}  // namespace ntkcl::nn
