#include "ntkcl/nn/prompts.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/token_mix_prompts.h"

namespace ntkcl::nn {
namespace {

// One block's generator, as views of the list.
struct Generator {
  ops::PromptMixing mixing;
  at::Tensor gate;
};

// b_g is the same for a token's C channels, so LN_p takes it away whatever it is: it is left out,
// and its gradient is exactly 0.
std::vector<Generator> generators(const PromptList& list, double scale) {
  const auto mix_weight = list.mix_weight.unbind(0);
  const auto norm_weight = list.norm_weight.unbind(0), norm_bias = list.norm_bias.unbind(0);
  const auto gate = list.gate.defined() ? list.gate.unbind(0) : std::vector<at::Tensor>{};
  std::vector<Generator> result;
  for (size_t l = 0; l < mix_weight.size(); ++l) {
    result.push_back({{.weight = mix_weight[l],
                       .norm_weight = norm_weight[l],
                       .norm_bias = norm_bias[l],
                       .carried = l == 0 ? 0 : list.prompts(),
                       .scale = scale,
                       .eps = kLayerNormEps,
                       .insert = false},
                      gate.empty() ? at::Tensor() : gate[l]});
  }
  return result;
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
  const std::vector<Generator> blocks = generators(prompts, scale);

  Residual x;
  for (int64_t l = 0; l < depth; ++l) {
    const Generator& g = blocks[static_cast<size_t>(l)];
    const bool last = l + 1 == depth && !trace;
    at::Tensor generated;
    if (l == 0) {
      // The image tokens' share of this block is the prefix; only the prompts are new.
      generated = ops::token_mix_prompts(prefix.hidden, g.mixing).out;
      x = {insert(prefix.hidden + prefix.mlp, vit.mlp(0, {generated}).update)};
    } else {
      const Residual after =
          vit.attention(l, x, {.class_token_only = last, .prompts = p, .prompt_gate = g.gate});
      // Of the last block only CLS leaves: its generator never reaches the output (section 8.5).
      // The residual of a prompt is q, which is what the tokens hold there.
      x = last ? vit.mlp(l, after) : vit.prompted_mlp(l, after, g.mixing, &generated);
    }
    if (trace) {
      trace->blocks.push_back(x.value());
      trace->prompts.push_back(generated);
    }
  }
  return vit.class_feature(x.value());
}

}  // namespace ntkcl::nn
