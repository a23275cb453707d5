#include "ntkcl/nn/vision_transformer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <set>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/attention.h"
#include "ntkcl/ops/gelu.h"

namespace ntkcl::nn {
namespace {

constexpr const char* kWhere = "vision_transformer";

// (B, T, C) -> (B, H, T, C / H)
at::Tensor split_heads(const at::Tensor& x, int64_t heads) {
  return x.view({x.size(0), x.size(1), heads, -1}).transpose(1, 2);
}

at::Tensor without_prompts(const at::Tensor& x, int64_t prompts) {  // tokens on dimension 2
  return at::cat({x.narrow(2, 0, 1), x.narrow(2, 1 + prompts, x.size(2) - 1 - prompts)}, 2);
}

// softmax(q k^T / sqrt(d)) v, over (B, H, T, d). Torch's fused CPU kernel multiplies tile by tile,
// which at a few hundred tokens is slower than two large products.
at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  if (!query.is_cpu()) {
    return at::scaled_dot_product_attention(query, key, value);
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(-1)));
  return at::matmul(at::softmax(at::matmul(query * scale, key.transpose(-2, -1)), -1), value);
}

at::Tensor through(const BlockProducts* products, BlockProducts::Product BlockProducts::*which,
                   const FrozenLinear& frozen, const at::Tensor& x) {
  return products && products->*which ? (products->*which)(x) : frozen(x);
}

const at::Tensor& need(const TensorMap& weights, const std::string& name) {
  const auto found = weights.find(name);
  NTKCL_CHECK(found != weights.end(), kWhere, "expected the key '", name,
              "' of a timm vision transformer, but it is missing");
  return found->second;
}

int64_t count_blocks(const TensorMap& weights) {
  int64_t depth = 0;
  while (weights.count("blocks." + std::to_string(depth) + ".norm1.weight")) {
    ++depth;
  }
  NTKCL_CHECK(depth > 0, kWhere, "expected the key 'blocks.0.norm1.weight', but it is missing");
  return depth;
}

// The first of the lines, and of each what a reader can take in.
std::string join(const std::vector<std::string>& lines) {
  constexpr size_t kLines = 20, kColumns = 200;
  std::string text;
  for (size_t i = 0; i < std::min(lines.size(), kLines); ++i) {
    text += "\n  " + lines[i].substr(0, kColumns);
  }
  const size_t more = lines.size() - std::min(lines.size(), kLines);
  return more ? text + "\n  and " + std::to_string(more) + " more" : text;
}

// Each key missing, unexpected or of another shape, one a line.
std::vector<std::string> mismatches(const TensorMap& weights,
                                    const std::map<std::string, std::vector<int64_t>>& expected) {
  std::vector<std::string> problems;
  for (const auto& [name, shape] : expected) {
    const auto found = weights.find(name);
    if (found == weights.end()) {
      problems.push_back("missing: " + name);
    } else if (found->second.sizes() != at::IntArrayRef(shape)) {
      std::ostringstream line;
      line << "shape: " << name << " expected " << at::IntArrayRef(shape) << ", got "
           << found->second.sizes();
      problems.push_back(line.str());
    }
  }
  for (const auto& [name, tensor] : weights) {
    if (!expected.count(name)) {
      problems.push_back("unexpected: " + name);
    }
  }
  return problems;
}

// timm's resample_abs_pos_embed: the class row is kept, the grid is resized bicubically.
at::Tensor resize_position(const at::Tensor& position, int64_t grid) {
  const int64_t old_grid = std::llround(std::sqrt(static_cast<double>(position.size(1) - 1)));
  if (grid == old_grid) {
    return position;
  }
  const auto dtype = position.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor old = position.narrow(1, 1, old_grid * old_grid).to(dtype);
  const at::Tensor image = old.reshape({1, old_grid, old_grid, -1}).permute({0, 3, 1, 2});
  const at::Tensor resized = at::_upsample_bicubic2d_aa(image, {grid, grid}, false);
  const at::Tensor rows = resized.permute({0, 2, 3, 1}).reshape({1, grid * grid, -1});
  return at::cat({position.narrow(1, 0, 1), rows.to(position.scalar_type())}, 1);
}

// Calls fn(matrix, rows of an image that go through it) for the matrices that passes use.
template <class Blocks, class Fn>
void for_each_used(Blocks& blocks, int64_t tokens, Fn fn) {
  for (auto& block : blocks) {
    const bool last = &block == &blocks.back();
    const int64_t tokens_after_attention = last ? 1 : tokens;
    for (FrozenLinear* linear : {&block.proj, &block.mlp.fc1, &block.mlp.fc2}) {
      fn(*linear, tokens_after_attention);
    }
    // The last block's whole projection serves only those who look inside.
    if (last) {
      fn(block.query, 1);
      fn(block.key_value, tokens);
    } else {
      fn(block.qkv, tokens);
    }
  }
}

}  // namespace

template <class Self, class Visitor>
void VisionTransformer::visit(Self& self, Visitor&& visitor) {
  visitor("cls_token", self.class_token_);
  visitor("pos_embed", self.position_);
  visitor("patch_embed.proj.weight", self.patch_weight_);
  visitor("patch_embed.proj.bias", self.patch_bias_);
  for (size_t l = 0; l < self.blocks_.size(); ++l) {
    const std::string block = "blocks." + std::to_string(l) + ".";
    auto& b = self.blocks_[l];
    visitor(block + "norm1.weight", b.norm_weight);
    visitor(block + "norm1.bias", b.norm_bias);
    visitor(block + "attn.qkv.weight", b.qkv.weight);
    visitor(block + "attn.qkv.bias", b.qkv.bias);
    visitor(block + "attn.proj.weight", b.proj.weight);
    visitor(block + "attn.proj.bias", b.proj.bias);
    visitor(block + "norm2.weight", b.mlp.norm_weight);
    visitor(block + "norm2.bias", b.mlp.norm_bias);
    visitor(block + "mlp.fc1.weight", b.mlp.fc1.weight);
    visitor(block + "mlp.fc1.bias", b.mlp.fc1.bias);
    visitor(block + "mlp.fc2.weight", b.mlp.fc2.weight);
    visitor(block + "mlp.fc2.bias", b.mlp.fc2.bias);
  }
  visitor("norm.weight", self.norm_weight_);
  visitor("norm.bias", self.norm_bias_);
}

VisionTransformer::VisionTransformer(const TensorMap& weights, int64_t heads, int64_t image_size)
    : heads_(heads), blocks_(static_cast<size_t>(count_blocks(weights))) {
  // Sizes come from three tensors; every other shape follows from them.
  const at::Tensor& patch = need(weights, "patch_embed.proj.weight");
  const at::Tensor& position = need(weights, "pos_embed");
  const at::Tensor& fc1 = need(weights, "blocks.0.mlp.fc1.weight");
  NTKCL_CHECK(
      patch.dim() == 4 && patch.size(1) == 3 && patch.size(2) == patch.size(3) && patch.numel() > 0,
      kWhere, "patch_embed.proj.weight: expected (C, 3, p, p), got ", patch.sizes());
  NTKCL_CHECK(position.dim() == 3 && position.size(1) >= 2, kWhere,
              "pos_embed: expected (1, tokens, C) with a class token, got ", position.sizes());
  NTKCL_CHECK(fc1.dim() == 2, kWhere, "blocks.0.mlp.fc1.weight: expected 2 dimensions, got ",
              fc1.sizes());
  width_ = patch.size(0);
  patch_size_ = patch.size(2);
  const int64_t c = width_, tokens = position.size(1), inner = fc1.size(0);
  const int64_t grid = std::llround(std::sqrt(static_cast<double>(tokens - 1)));
  NTKCL_CHECK(grid * grid == tokens - 1, kWhere,
              "pos_embed: expected 1 + a square number of tokens, got ", tokens);
  NTKCL_CHECK(heads > 0 && c % heads == 0, kWhere, "heads: expected a divisor of the width ", c,
              ", got ", heads);

  std::map<std::string, std::vector<int64_t>> expected;
  visit(*this, [&](const std::string& name, at::Tensor&) {
    const bool bias = name.ends_with("bias");
    const auto shape_of = [&](int64_t out, int64_t in) {
      return bias ? std::vector<int64_t>{out} : std::vector<int64_t>{out, in};
    };
    auto& shape = expected[name];
    if (name == "cls_token") {
      shape = {1, 1, c};
    } else if (name == "pos_embed") {
      shape = {1, tokens, c};
    } else if (name.starts_with("patch_embed")) {
      shape = bias ? std::vector<int64_t>{c} : patch.sizes().vec();
    } else if (name.find("qkv") != std::string::npos) {
      shape = shape_of(3 * c, c);
    } else if (name.find("attn.proj") != std::string::npos) {
      shape = shape_of(c, c);
    } else if (name.find("fc1") != std::string::npos) {
      shape = shape_of(inner, c);
    } else if (name.find("fc2") != std::string::npos) {
      shape = shape_of(c, inner);
    } else {
      shape = {c};
    }
  });
  const auto problems = mismatches(weights, expected);
  NTKCL_CHECK(problems.empty(), kWhere, "the weights do not fit a vision transformer of width ", c,
              " and depth ", depth(), ":", join(problems));
  visit(*this, [&](const std::string& name, at::Tensor& tensor) {
    tensor = weights.at(name).detach().contiguous();
    NTKCL_CHECK(at::isFloatingType(tensor.scalar_type()), kWhere, name,
                ": expected a floating point tensor, got ", tensor.scalar_type());
  });

  image_size_ = image_size > 0 ? image_size : grid * patch_size_;
  NTKCL_CHECK(image_size_ % patch_size_ == 0, kWhere, "image_size: expected a multiple of the ",
              "patch size ", patch_size_, ", got ", image_size_);
  position_ = resize_position(position_, image_size_ / patch_size_);
  split_last_projection();
}

void VisionTransformer::split_last_projection() {
  Block& last = blocks_.back();
  last.query = last.qkv.outputs(0, width_);
  last.key_value = last.qkv.outputs(width_, 2 * width_);
}

VisionTransformer VisionTransformer::to(at::ScalarType dtype, at::Device device,
                                        std::optional<at::ScalarType> products) const {
  VisionTransformer copy = *this;
  visit(copy, [&](const std::string& name, at::Tensor& tensor) {
    const bool product =
        name.find(".attn.") != std::string::npos || name.find(".mlp.") != std::string::npos;
    tensor = tensor.to(device, product ? products.value_or(dtype) : dtype);
  });
  for (Block& block : copy.blocks_) {
    for (FrozenLinear* linear : {&block.qkv, &block.proj, &block.mlp.fc1, &block.mlp.fc2}) {
      *linear = {.weight = linear->weight, .bias = linear->bias};
    }
  }
  copy.split_last_projection();
  copy.matrices_ = Matrices::kPlain;
  if (given_.empty()) {
    for (int64_t l = 0; l < depth(); ++l) {
      copy.given_.push_back(weights(l));
    }
  }
  return copy;
}

VisionTransformer VisionTransformer::packed() const {
  constexpr int64_t kImages = 16;  // a usual batch
  VisionTransformer copy = *this;
  copy.matrices_ = Matrices::kPacked;
  for_each_used(copy.blocks_, tokens(),
                [](FrozenLinear& linear, int64_t rows) { linear = linear.pack(kImages * rows); });
  return copy;
}

VisionTransformer VisionTransformer::quantised() const {
  VisionTransformer copy = *this;
  copy.matrices_ = Matrices::kQuantised;
  for_each_used(copy.blocks_, tokens(),
                [](FrozenLinear& linear, int64_t) { linear = linear.quantise(); });
  return copy;
}

VisionTransformer VisionTransformer::recomputing(bool recompute) const {
  VisionTransformer copy = *this;
  for (Block& block : copy.blocks_) {
    block.mlp.recompute = recompute;
  }
  return copy;
}

VisionTransformer VisionTransformer::with_weights(const std::vector<BlockTensors>& weights) const {
  NTKCL_ASSERT(weights.size() <= blocks_.size());
  VisionTransformer copy = *this;
  const auto put = [&](FrozenLinear& linear, const at::Tensor& weight) {
    const at::Tensor& used = weight.defined() ? weight : linear.weight;
    linear = {.weight = used.to(linear.weight.options()).contiguous(), .bias = linear.bias};
  };
  for (size_t l = 0; l < weights.size(); ++l) {
    put(copy.blocks_[l].qkv, weights[l].qkv);
    put(copy.blocks_[l].proj, weights[l].proj);
    put(copy.blocks_[l].mlp.fc1, weights[l].fc1);
    put(copy.blocks_[l].mlp.fc2, weights[l].fc2);
  }
  copy.split_last_projection();
  copy.given_.clear();
  switch (matrices_) {
    case Matrices::kPacked:
      return copy.packed();
    case Matrices::kQuantised:
      return copy.quantised();
    default:
      return copy;
  }
}

VisionTransformer VisionTransformer::with_final_norm(const at::Tensor& weight,
                                                     const at::Tensor& bias) const {
  VisionTransformer copy = *this;
  copy.norm_weight_ = weight;
  copy.norm_bias_ = bias;
  return copy;
}

at::ScalarType VisionTransformer::product_type() const {
  return blocks_.front().qkv.weight.scalar_type();
}

BlockTensors VisionTransformer::weights(int64_t block) const {
  const auto l = static_cast<size_t>(block);
  if (!given_.empty()) {
    return given_[l];
  }
  const Block& b = blocks_[l];
  return {b.qkv.weight, b.proj.weight, b.mlp.fc1.weight, b.mlp.fc2.weight};
}

BlockTensors VisionTransformer::biases(int64_t block) const {
  const Block& b = blocks_[static_cast<size_t>(block)];
  return {b.qkv.bias, b.proj.bias, b.mlp.fc1.bias, b.mlp.fc2.bias};
}

at::Tensor VisionTransformer::embed(const at::Tensor& images) const {
  NTKCL_CHECK(images.dim() == 4 && images.size(1) == 3 && images.size(2) == image_size_ &&
                  images.size(3) == image_size_,
              kWhere, "images: expected (B, 3, ", image_size_, ", ", image_size_, "), got ",
              images.sizes());
  // A patch is one row: the convolution is a GEMM over unfolded patches.
  const int64_t b = images.size(0), p = patch_size_, g = image_size_ / p;
  const at::Tensor rows =
      images.reshape({b, 3, g, p, g, p}).permute({0, 2, 4, 1, 3, 5}).reshape({b, g * g, 3 * p * p});
  const at::Tensor patches = at::linear(rows, patch_weight_.view({width_, -1}), patch_bias_);
  return at::cat({class_token_.expand({b, -1, -1}), patches}, 1) + position_;
}

Residual VisionTransformer::attention(int64_t block, const Residual& x,
                                      const AttentionOptions& options) const {
  const Block& w = blocks_[static_cast<size_t>(block)];
  const auto [value, y, mean, scale] = layer_norm(x, w.norm_weight, w.norm_bias, product_type());
  const at::Tensor mixed = y.is_cpu() && !options.class_token_only ? mix_packed(w, y, options)
                                                                   : mix_heads(w, y, options);
  return {options.class_token_only ? value.narrow(1, 0, 1) : value,
          through(options.products, &BlockProducts::proj, w.proj, mixed)};
}

at::Tensor VisionTransformer::mix_packed(const Block& w, const at::Tensor& y,
                                         const AttentionOptions& options) const {
  const auto gate = gate_of(options);
  const at::Tensor qkv = through(options.products, &BlockProducts::qkv, w.qkv, y);
  return ops::attention(qkv, heads_, gate, gate ? options.prompts : 0);
}

at::Tensor VisionTransformer::mix_heads(const Block& w, const at::Tensor& y,
                                        const AttentionOptions& options) const {
  const int64_t c = width_;
  at::Tensor query, key, value;
  if (options.class_token_only) {
    const at::Tensor kv = through(options.products, &BlockProducts::key_value, w.key_value, y);
    query = through(options.products, &BlockProducts::query, w.query, y.narrow(1, 0, 1));
    key = kv.narrow(2, 0, c);
    value = kv.narrow(2, c, c);
  } else {
    const at::Tensor qkv = through(options.products, &BlockProducts::qkv, w.qkv, y);
    query = qkv.narrow(2, 0, c);
    key = qkv.narrow(2, c, c);
    value = qkv.narrow(2, 2 * c, c);
  }
  query = split_heads(query, heads_);
  key = split_heads(key, heads_);
  value = split_heads(value, heads_);

  at::Tensor mixed;
  if (const auto gate = gate_of(options)) {
    const int64_t p = options.prompts;
    mixed = attend(query, without_prompts(key, p), without_prompts(value, p));
    const at::Tensor from_prompts = attend(query, key.narrow(2, 1, p), value.narrow(2, 1, p));
    mixed = mixed + gate->view({1, heads_, 1, 1}) * from_prompts;
  } else {
    mixed = attend(query, key, value);
  }
  return mixed.transpose(1, 2).reshape({y.size(0), -1, c});
}

std::optional<at::Tensor> VisionTransformer::gate_of(const AttentionOptions& options) const {
  const bool gated = options.prompt_gate.defined() && options.prompts > 0;
  return gated ? std::optional(options.prompt_gate.to(product_type())) : std::nullopt;
}

Residual VisionTransformer::mlp(int64_t block, const Residual& hidden,
                                const BlockProducts* products) const {
  const FrozenMlp& w = blocks_[static_cast<size_t>(block)].mlp;
  if (!products || (!products->fc1 && !products->fc2)) {
    return w(hidden);
  }
  const auto [value, y, mean, scale] =
      layer_norm(hidden, w.norm_weight, w.norm_bias, product_type());
  const at::Tensor inner = ops::gelu(through(products, &BlockProducts::fc1, w.fc1, y));
  return {value, through(products, &BlockProducts::fc2, w.fc2, inner)};
}

Residual VisionTransformer::prompted_mlp(int64_t block, const Residual& hidden,
                                         const ops::PromptMixing& mixing,
                                         at::Tensor* generated) const {
  return blocks_[static_cast<size_t>(block)].mlp.with_prompts(hidden, mixing, generated);
}

at::Tensor VisionTransformer::class_feature(const at::Tensor& x) const {
  return layer_norm({x.select(1, 0)}, norm_weight_, norm_bias_, x.scalar_type()).out;
}

Prefix VisionTransformer::prefix(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const Residual after = mlp(0, attention(0, {embed(images)}, {}));
  return {after.stream, after.update};
}

at::Tensor plain_pass(const VisionTransformer& vit, const Prefix& prefix, Trace* trace) {
  Residual x{prefix.hidden, prefix.mlp};
  if (trace) {
    trace->blocks.push_back(x.value());
  }
  for (int64_t l = 1; l < vit.depth(); ++l) {
    const bool last = l + 1 == vit.depth() && !trace;
    x = vit.mlp(l, vit.attention(l, x, {.class_token_only = last}));
    if (trace) {
      trace->blocks.push_back(x.value());
    }
  }
  return vit.class_feature(x.value());
}

at::Tensor pass_with_products(const VisionTransformer& vit, const at::Tensor& images,
                              const std::vector<BlockProducts>& products) {
  Residual x;
  {
    const at::NoGradGuard no_grad;
    x.stream = vit.embed(images);
  }
  for (int64_t l = 0; l < vit.depth(); ++l) {
    const auto i = static_cast<size_t>(l);
    const BlockProducts* own = i < products.size() ? &products[i] : nullptr;
    const Residual h =
        vit.attention(l, x, {.class_token_only = l + 1 == vit.depth(), .products = own});
    x = vit.mlp(l, h, own);
  }
  return x.value();
}

}  // namespace ntkcl::nn
