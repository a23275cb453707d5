#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ntkcl::ops {

// Multi-head attention over a packed projection, of a vision transformer with or without prompts:
//
//   out = softmax(q k^T / sqrt(d)) v                       in each of H heads of width d = C / H
//
//   qkv      (B, T, 3C) float32, float64 or bfloat16: a token's q, k and v, each head by head
//   ->       (B, T, C)
//
// With a gate (H), of qkv's type, tokens 1 .. prompts are prompts, and are attended to apart, so
// that a gate of 0 leaves the other tokens as if there were none (NTK-CL specification 8.1):
//
//   out = softmax(q k_tokens^T / sqrt(d)) v_tokens + gate[h] softmax(q k_prompts^T / sqrt(d))
//   v_prompts
//
// Nothing but qkv is kept for the backward pass, which computes the softmax anew. On CPU a head's
// matrices stay in the cache: for the few hundred tokens of a vision transformer several times
// faster than torch's fused attention (benchmarks/ops.py); of bfloat16, sums and softmaxes are
// float32, and where the processor multiplies bfloat16, weights and the scores' gradients are
// rounded for the products. On CUDA it is made of torch's operators; prefer torch's fused one.
// Errors: ValueError (shapes, devices), TypeError (element types).
at::Tensor attention(const at::Tensor& qkv, int64_t heads, const std::optional<at::Tensor>& gate,
                     int64_t prompts);

// grad (B, T, C) -> gradients of qkv (B, T, 3C) and of gate (H; (0) without one).
std::tuple<at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                                                      int64_t heads,
                                                      const std::optional<at::Tensor>& gate,
                                                      int64_t prompts);

}  // namespace ntkcl::ops
