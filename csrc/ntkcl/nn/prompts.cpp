#include "ntkcl/nn/prompts.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"

namespace ntkcl::nn {
namespace {

// One block's generator, as views of the list.
struct Generator {
  at::Tensor mix_weight, norm_weight, norm_bias, gate;
};

std::vector<Generator> generators(const PromptList& list) {
  const auto mix_weight = list.mix_weight.unbind(0);
  const auto norm_weight = list.norm_weight.unbind(0), norm_bias = list.norm_bias.unbind(0);
  const auto gate = list.gate.defined() ? list.gate.unbind(0) : std::vector<at::Tensor>{};
  std::vector<Generator> result;
  for (size_t l = 0; l < mix_weight.size(); ++l) {
    result.push_back(
        {mix_weight[l], norm_weight[l], norm_bias[l], gate.empty() ? at::Tensor() : gate[l]});
  }
  return result;
}

// LN_p(W_g x0 + b_g): (B, N, C) -> (B, P, C). b_g is the same for a token's C channels, so LN_p
// takes it away whatever it is: it is left out, and its gradient is exactly 0.
at::Tensor generate(const Generator& g, const at::Tensor& x0) {
  // Not matmul, which transposes x0 where the weight requires a gradient.
  const at::Tensor mixed = at::bmm(g.mix_weight.expand({x0.size(0), -1, -1}), x0);
  return layer_norm({mixed}, g.norm_weight, g.norm_bias, mixed.scalar_type()).out;
}

// [cls, prompts, patches] of tokens whose first row is cls.
at::Tensor insert(const at::Tensor& tokens, const at::Tensor& prompts) {
  return at::cat({tokens.narrow(1, 0, 1), prompts, tokens.narrow(1, 1, tokens.size(1) - 1)}, 1);
}

}  // namespace

PromptList PromptList::zeros(int64_t blocks, int64_t prompts, int64_t tokens, int64_t width,
                             const at::TensorOptions& options) {
  return {at::zeros({blocks, prompts, tokens}, options), at::zeros({blocks, prompts}, options),
          at::zeros({blocks, width}, options), at::zeros({blocks, width}, options), at::Tensor()};
}

std::vector<at::Tensor> PromptList::tensors() const {
  std::vector<at::Tensor> all{mix_weight, mix_bias, norm_weight, norm_bias};
  if (gate.defined()) {
    all.push_back(gate);
  }
  return all;
}

std::vector<at::Tensor> PromptList::weights() const {
  return {mix_weight, norm_weight};
}

void PromptList::visit(const std::string& prefix, const NamedTensorFn& fn) {
  for (int64_t l = 0; l < mix_weight.size(0); ++l) {
    const std::string block = prefix + std::to_string(l) + ".";
    for (const auto& [name, stacked] :
         {std::pair<const char*, at::Tensor&>{"mix.weight", mix_weight},
          {"mix.bias", mix_bias},
          {"norm.weight", norm_weight},
          {"norm.bias", norm_bias},
          {"gate", gate}}) {
      if (stacked.defined()) {
        visit_block(block + name, stacked, l, fn);
      }
    }
  }
}

at::Tensor patch_pass(const VisionTransformer& vit, const Prefix& prefix, const PromptList& prompts,
                      double scale, Trace* trace) {
  const int64_t depth = vit.depth(), p = prompts.prompts();
  NTKCL_CHECK(prompts.mix_weight.size(0) == depth && prompts.mix_weight.size(2) == vit.tokens(),
              "patch_pass", "expected generators for ", depth, " blocks and ", vit.tokens(),
              " tokens, got ", prompts.mix_weight.sizes());
  const std::vector<Generator> blocks = generators(prompts);

  Residual x;
  for (int64_t l = 0; l < depth; ++l) {
    const Generator& g = blocks[static_cast<size_t>(l)];
    const bool last = l + 1 == depth && !trace;
    at::Tensor generated;
    if (l == 0) {
      // The image tokens' share of this block is the prefix; only the prompts are new.
      generated = generate(g, prefix.hidden);
      x = {insert(prefix.hidden + prefix.mlp, vit.mlp(0, {generated}).update)};
    } else {
      const Residual after =
          vit.attention(l, x, {.class_token_only = last, .prompts = p, .prompt_gate = g.gate});
      if (last) {
        // Only CLS leaves: the last generator never reaches the output (section 8.5).
        x = vit.mlp(l, after);
      } else {
        const at::Tensor h = after.value();
        const auto parts = h.split_with_sizes({1, p, h.size(1) - 1 - p}, 1);
        generated = at::add(generate(g, at::cat({parts[0], parts[2]}, 1)), parts[1], scale);
        // The residual of a prompt is q, which is what h holds there.
        x = {h, vit.mlp(l, {at::cat({parts[0], generated, parts[2]}, 1)}).update};
      }
    }
    if (trace) {
      trace->blocks.push_back(x.value());
      trace->prompts.push_back(generated);
    }
  }
  return vit.class_feature(x.value());
}

}  // namespace ntkcl::nn
