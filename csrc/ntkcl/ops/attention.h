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
//   ->       out (B, T, C), the softmax weights (B*H, T, T), prompt weights (0)
//
// With a gate (H), of qkv's type, tokens 1 .. prompts are prompts, and are attended to apart, so
// that a gate of 0 leaves the other tokens as if there were none (NTK-CL specification 8.1):
//
//   out = softmax(q k_tokens^T / sqrt(d)) v_tokens + gate[h] softmax(q k_prompts^T / sqrt(d))
//   v_prompts
//
//   ->       weights (B*H, T, T-P), prompt weights (B*H, T, P)
//
// Weights are there for the backward pass and for looking inside; they have no gradient, and their
// rows and columns stand in the order class token, patches, prompts. Of bfloat16, sums and
// exponentials are float32; the scaled q, the products of q and k and the weights are rounded. The
// weights are kept for the backward pass, B*H*T^2 elements. For the few hundred tokens of a vision
// transformer this is faster on CPU than torch's fused attention, which multiplies tile by tile
// (benchmarks/ops.py); on CUDA prefer the latter.
// Errors: ValueError (shapes, devices), TypeError (element types).
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention(const at::Tensor& qkv, int64_t heads,
                                                         const std::optional<at::Tensor>& gate,
                                                         int64_t prompts);

// grad (B, T, C) -> gradients of qkv (B, T, 3C) and of gate (H; (0) without one).
std::tuple<at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                                                      const at::Tensor& weights,
                                                      const at::Tensor& prompt_weights,
                                                      int64_t heads,
                                                      const std::optional<at::Tensor>& gate,
                                                      int64_t prompts);

}  // namespace ntkcl::ops
