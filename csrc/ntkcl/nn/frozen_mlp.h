#pragma once

#include "ntkcl/nn/frozen_linear.h"
#include "ntkcl/nn/residual.h"
#include "ntkcl/ops/token_mix_prompts.h"

namespace ntkcl::nn {

// A block's h + MLP(LN2(h)) of weights that are never trained, the last addition left open:
//
//   MLP(y) = fc2(gelu(fc1(y)))        (B, T, C) -> (B, T, C)
//
// h is in the type of the norm, the products in that of fc1, and so is the update that leaves.
struct FrozenMlp {
  at::Tensor norm_weight{}, norm_bias{};
  FrozenLinear fc1{}, fc2{};
  // Keep h alone for the backward pass, and compute the activations between anew: a good third less
  // memory of what a block keeps, for a product of fc1 more.
  bool recompute = false;

  Residual operator()(const Residual& hidden) const;

  // The same with prompts: h carries P of them behind its class token, LN2 and the rest see newly
  // mixed ones in their place (ops/token_mix_prompts.h; mixing.insert is false). The stream that
  // leaves is h as it was.
  // `generated` receives the new prompts (B, P, C), without a gradient.
  Residual with_prompts(const Residual& hidden, const ops::PromptMixing& mixing,
                        at::Tensor* generated = nullptr) const;
};

}  // namespace ntkcl::nn
