#pragma once

#include "ntkcl/nn/adapter.h"

namespace ntkcl::nn {

// One prompt generator per block, mixing over the token axis (NTK-CL section 2, "patch"):
//
//   G = W_g x0 + b_g  (P x C, x0 = h without its prompts),  prompts = LN_p(G)
//
// and, from the second block on, prompts += s * q with q the prompts that h carries.
struct PromptList {
  at::Tensor mix_weight;   // (L, P, N)  W_g
  at::Tensor mix_bias;     // (L, P)     b_g
  at::Tensor norm_weight;  // (L, C)     LN_p
  at::Tensor norm_bias;    // (L, C)
  at::Tensor gate;         // (L, H), or undefined: prompts without a gate (section 8.1)

  static PromptList zeros(int64_t blocks, int64_t prompts, int64_t tokens, int64_t width,
                          const at::TensorOptions& options);

  int64_t prompts() const { return mix_weight.size(1); }
  std::vector<at::Tensor> tensors() const;
  std::vector<at::Tensor> weights() const;
  // "{block}.mix.weight", "{block}.mix.bias", "{block}.norm.weight", "{block}.norm.bias",
  // "{block}.gate".
  void visit(const std::string& prefix, const NamedTensorFn& fn);
};

// One pass with prompts: class features (B, C). Tokens are ordered cls, prompts, patches; the first
// block turns N tokens into N + P.
at::Tensor patch_pass(const VisionTransformer& vit, const Prefix& prefix, const PromptList& prompts,
                      double scale, Trace* trace = nullptr);

}  // namespace ntkcl::nn
