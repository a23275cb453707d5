#include "ntkcl/methods/peft.h"

#include <ATen/ATen.h>

#include <cmath>

#include "ntkcl/core/error.h"

namespace ntkcl::methods {

namespace {

// Kaiming-uniform with a = sqrt(5) of a matrix with so many inputs.
at::Tensor kaiming(const Draw& draw, at::IntArrayRef sizes, const nn::VisionTransformer& vit,
                   RandomSource& random) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(sizes.back()));
  return random.uniform(draw, sizes, -bound, bound, vit.options());
}

}  // namespace

nn::AdapterList fresh_adapters(const nn::VisionTransformer& vit, int64_t rank, const Draw& draw,
                               RandomSource& random) {
  const int64_t l = vit.depth(), c = vit.width();
  nn::AdapterList adapters = nn::AdapterList::zeros(l, rank, c, vit.options());
  adapters.down_weight = kaiming(draw, {l, rank, c}, vit, random);
  return adapters;
}

nn::PromptList fresh_prompts(const nn::VisionTransformer& vit, int64_t prompts, const Draw& draw,
                             RandomSource& random) {
  const int64_t l = vit.depth(), n = vit.tokens();
  nn::PromptList list = nn::PromptList::zeros(l, prompts, n, vit.width(), vit.options());
  list.mix_weight = kaiming(draw, {l, prompts, n}, vit, random);
  list.norm_weight.fill_(1.0);
  list.gate = at::zeros({l, vit.heads()}, vit.options());
  return list;
}

Peft::Peft(PeftOptions options, const nn::VisionTransformer& vit)
    : options_(std::move(options)), vit_(vit) {
  const int64_t l = vit.depth(), r = options_.rank, c = vit.width();
  NTKCL_CHECK(r > 0, "peft", "'rank': expected a positive number, got ", r);
  if (options_.kind == "adapter") {
    adapters_ = nn::AdapterList::zeros(l, r, c, vit.options());
  } else if (options_.kind == "lora") {
    lora_.emplace(vit, /*mlp=*/true, l, r);
    const at::Tensor all = at::ones({lora_->types(), lora_->blocks()}, at::kDouble);
    lora_->train(/*current=*/all, /*old=*/all);
  } else {
    NTKCL_CHECK(options_.kind == "prompts", "peft",
                "'peft': expected one of: adapter, lora, prompts, got '", options_.kind, "'");
    prompts_ = nn::PromptList::zeros(l, r, vit.tokens(), c, vit.options());
    prompts_->gate = at::zeros({l, vit.heads()}, vit.options());
  }
}

void Peft::initialise(int64_t task, RandomSource& random) {
  if (adapters_) {
    adapters_ = fresh_adapters(vit_, options_.rank, {"adapter.down", task}, random);
  } else if (prompts_) {
    prompts_ = fresh_prompts(vit_, options_.rank, {"prompts.mix", task}, random);
  } else {
    const double bound = 1.0 / std::sqrt(static_cast<double>(options_.rank));
    lora_->begin([&](int64_t type, int64_t block, const at::Tensor& old) {
      return random.uniform({"lora.down", task, 0, type, block}, {old.size(0), options_.rank},
                            -bound, bound, vit_.options());
    });
  }
}

std::vector<at::Tensor> Peft::parameters() const {
  if (adapters_) {
    return adapters_->tensors();
  }
  if (prompts_) {
    return prompts_->tensors();
  }
  std::vector<at::Tensor> parameters;
  for (const nn::LoraGroup& group : lora_->groups()) {
    parameters.push_back(group.down);
    parameters.push_back(group.up);
  }
  return parameters;
}

at::Tensor Peft::features(const at::Tensor& images) const {
  if (lora_) {
    return vit_.class_feature(nn::pass_with_products(vit_, images, lora_->products()));
  }
  const nn::Prefix prefix = vit_.prefix(images);
  return prompts_ ? nn::patch_pass(vit_, prefix, *prompts_, options_.scale)
                  : nn::channel_pass(vit_, prefix, *adapters_, options_.scale);
}

void Peft::visit_state(const std::string& prefix, const StateVisitor& visitor) {
  if (adapters_) {
    adapters_->visit(prefix, visitor);
    return;
  }
  if (prompts_) {
    prompts_->visit(prefix, visitor);
    return;
  }
  for (nn::LoraGroup& group : lora_->groups()) {
    for (int64_t l = 0; l < lora_->blocks(); ++l) {
      const std::string block = prefix + std::to_string(l) + "." + group.name + ".";
      nn::visit_block(block + "down", group.down, l, visitor);
      nn::visit_block(block + "up", group.up, l, visitor);
    }
  }
}

}  // namespace ntkcl::methods
