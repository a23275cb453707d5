#include "ntkcl/methods/peft.h"

#include <ATen/ATen.h>

#include <cmath>

namespace ntkcl::methods {

nn::AdapterList fresh_adapters(const nn::VisionTransformer& vit, int64_t rank, const Draw& draw,
                               RandomSource& random) {
  const int64_t l = vit.depth(), c = vit.width();
  const double bound = 1.0 / std::sqrt(static_cast<double>(c));
  nn::AdapterList adapters = nn::AdapterList::zeros(l, rank, c, vit.options());
  adapters.down_weight = random.uniform(draw, {l, rank, c}, -bound, bound, vit.options());
  return adapters;
}

Peft::Peft(PeftOptions options, const nn::VisionTransformer& vit)
    : options_(std::move(options)), vit_(vit) {
  if (options_.kind == "lora") {
    lora_.emplace(vit, /*mlp=*/true, vit.depth(), options_.rank);
    const at::Tensor all = at::ones({lora_->types(), lora_->blocks()}, at::kDouble);
    lora_->train(/*current=*/all, /*old=*/all);
  } else {
    adapters_ = nn::AdapterList::zeros(vit.depth(), options_.rank, vit.width(), vit.options());
  }
}

void Peft::initialise(int64_t task, RandomSource& random) {
  if (!lora_) {
    adapters_ = fresh_adapters(vit_, options_.rank, {"adapter.down", task}, random);
    return;
  }
  const double bound = 1.0 / std::sqrt(static_cast<double>(options_.rank));
  lora_->begin([&](int64_t type, int64_t block, const at::Tensor& old) {
    return random.uniform({"lora.down", task, 0, type, block}, {old.size(0), options_.rank}, -bound,
                          bound, vit_.options());
  });
}

std::vector<at::Tensor> Peft::parameters() const {
  if (!lora_) {
    return adapters_.tensors();
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
  return nn::channel_pass(vit_, vit_.prefix(images), adapters_, options_.scale);
}

void Peft::visit_state(const std::string& prefix, const StateVisitor& visitor) {
  if (!lora_) {
    adapters_.visit(prefix, visitor);
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
