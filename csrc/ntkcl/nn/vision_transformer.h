#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ntkcl/nn/frozen_mlp.h"

namespace ntkcl::nn {

using TensorMap = std::map<std::string, at::Tensor>;

// Products of a block that stand in the place of the frozen ones, (..., in) -> (..., out) with the
// bias; where one is empty the frozen one stays. The class token alone goes through `query`, beside
// `key_value` for all tokens.
struct BlockProducts {
  using Product = std::function<at::Tensor(const at::Tensor&)>;
  Product qkv, query, key_value, proj, fc1, fc2;
};

// The matrices of a block, or their biases, as timm has them.
struct BlockTensors {
  at::Tensor qkv;   // (3C, C)
  at::Tensor proj;  // (C, C)
  at::Tensor fc1;   // (I, C)
  at::Tensor fc2;   // (C, I)
};

// What the attention of one block is asked for.
struct AttentionOptions {
  // Only the class token's row leaves: keys and values of all tokens, one query. Exact, and all
  // that the last block needs.
  bool class_token_only = false;
  // Tokens 1 .. prompts are prompts. With a gate g (H), prompts are attended to by a softmax of
  // their own: softmax(q K_tokens) V_tokens + g * softmax(q K_prompts) V_prompts. Without one they
  // are tokens like all others.
  int64_t prompts = 0;
  at::Tensor prompt_gate{};
  const BlockProducts* products = nullptr;
};

// The first block up to where PEFT begins. It depends on the image alone, so all passes share it.
struct Prefix {
  at::Tensor hidden;  // (B, N, C)  h = x + Attn(LN1(x))
  at::Tensor mlp;     // (B, N, C)  MLP(LN2(h))
};

// A frozen pre-LN vision transformer in timm's layout: exact GELU, LayerNorm eps 1e-6, qkv bias, a
// class token, no head. The weights never require gradients; dtype and device are theirs.
//
//   block:  h = x + Attn(LN1(x)),  y = h + MLP(LN2(h));   feature: CLS row of the final LayerNorm
//
// N = 1 + (image / patch)^2 tokens, C width, H heads, L blocks.
class VisionTransformer {
 public:
  // `weights` under timm's names (cls_token, pos_embed, patch_embed.proj.*, blocks.{l}.*, norm.*).
  // `image_size` 0 keeps the checkpoint's; any other multiple of the patch size has the position
  // embedding interpolated as timm does (bicubic, antialias). ValueError lists missing, unexpected
  // and misshapen keys.
  VisionTransformer(const TensorMap& weights, int64_t heads, int64_t image_size = 0);

  // `products`: type of the blocks' matrices and of the activations between LayerNorm and residual;
  // none: `dtype`. bfloat16 beside float32 leaves the patch embedding, the residual stream,
  // LayerNorms, softmax sums and all that is trained in float32.
  VisionTransformer to(at::ScalarType dtype, at::Device device,
                       std::optional<at::ScalarType> products = std::nullopt) const;
  // With the blocks' matrices in the layouts that the processor's products want: faster on the CPU
  // by a tenth or more, for twice the memory of the matrices beside them. See FrozenLinear.
  VisionTransformer packed() const;
  // With the blocks' products of 8-bit floating point numbers. See FrozenLinear. ValueError for
  // matrices with sides that are no multiples of 16.
  VisionTransformer quantised() const;
  // Whose MLPs keep less for the backward pass. See FrozenMlp.
  VisionTransformer recomputing(bool recompute) const;
  // With other matrices in its first blocks, of any type; an undefined one stays as it is. Packed
  // or quantised where this one is.
  VisionTransformer with_weights(const std::vector<BlockTensors>& weights) const;
  // With another final LayerNorm (C), (C).
  VisionTransformer with_final_norm(const at::Tensor& weight, const at::Tensor& bias) const;

  int64_t width() const { return width_; }
  int64_t depth() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t heads() const { return heads_; }
  int64_t patch_size() const { return patch_size_; }
  int64_t image_size() const { return image_size_; }
  int64_t tokens() const { return position_.size(1); }
  at::TensorOptions options() const { return position_.options(); }
  at::ScalarType product_type() const;
  // As they were given, whatever `products` rounds them to.
  BlockTensors weights(int64_t block) const;
  BlockTensors biases(int64_t block) const;

  // (B, 3, S, S) -> (B, N, C): patches, class token, position embedding.
  at::Tensor embed(const at::Tensor& images) const;
  // x + Attn(LN1(x)): (B, T, C) -> (B, T, C), or (B, 1, C) for the class token alone. As in `mlp`
  // the result's stream is the value of what was given, its update the block's share.
  Residual attention(int64_t block, const Residual& x, const AttentionOptions& options) const;
  // h + MLP(LN2(h)): (B, T, C) -> (B, T, C).
  Residual mlp(int64_t block, const Residual& hidden,
               const BlockProducts* products = nullptr) const;
  // The same where new prompts take the places of those that the tokens carry. See FrozenMlp.
  Residual prompted_mlp(int64_t block, const Residual& hidden, const ops::PromptMixing& mixing,
                        at::Tensor* generated = nullptr) const;
  // CLS row of the final LayerNorm: (B, T, C) -> (B, C).
  at::Tensor class_feature(const at::Tensor& x) const;

  // Never builds a graph: nothing in it is trained.
  Prefix prefix(const at::Tensor& images) const;

 private:
  struct Block {
    at::Tensor norm_weight, norm_bias;  // LN1
    FrozenLinear qkv, proj;
    FrozenMlp mlp;
    // Parts of qkv for the class token alone, in the last block.
    FrozenLinear query, key_value;
  };
  void split_last_projection();
  // y (B, T, C) -> the heads' results side by side, (B, T, C), or (B, 1, C) for the class token.
  // By our operator over packed heads, for every token; or by torch's, for all cases.
  at::Tensor mix_packed(const Block& w, const at::Tensor& y, const AttentionOptions& options) const;
  at::Tensor mix_heads(const Block& w, const at::Tensor& y, const AttentionOptions& options) const;
  std::optional<at::Tensor> gate_of(const AttentionOptions& options) const;
  // Every tensor by its timm name.
  template <class Self, class Visitor>
  static void visit(Self& self, Visitor&& visitor);

  int64_t width_ = 0, heads_ = 0, patch_size_ = 0, image_size_ = 0;
  at::Tensor patch_weight_, patch_bias_, class_token_, position_, norm_weight_, norm_bias_;
  std::vector<Block> blocks_;
  std::vector<BlockTensors> given_;  // matrices before `to`; empty: those of the blocks
  enum class Matrices { kPlain, kPacked, kQuantised };
  Matrices matrices_ = Matrices::kPlain;
};

// What a pass saw, for tests and for looking inside: block outputs and generated prompts.
// With a trace the last block computes every token.
struct Trace {
  std::vector<at::Tensor> blocks;   // (B, T, C) per block
  std::vector<at::Tensor> prompts;  // (B, P, C) per block, patch passes only
};

// The backbone with no PEFT: (B, C).
at::Tensor plain_pass(const VisionTransformer& vit, const Prefix& prefix, Trace* trace = nullptr);

// The class token after the last block, (B, 1, C), through other products in the first blocks.
at::Tensor pass_with_products(const VisionTransformer& vit, const at::Tensor& images,
                              const std::vector<BlockProducts>& products);

}  // namespace ntkcl::nn
