#pragma once

#include <optional>

#include "ntkcl/core/options.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/nn/adapter.h"
#include "ntkcl/nn/composed_lora.h"
#include "ntkcl/nn/prompts.h"

// Modules that are trained in the frozen backbone, of the baselines.
namespace ntkcl::methods {

// Adapters that change nothing yet: W_down Kaiming-uniform with a = sqrt(5), all else zero.
nn::AdapterList fresh_adapters(const nn::VisionTransformer& vit, int64_t rank, const Draw& draw,
                               RandomSource& random);

// Prompts behind closed gates, which change nothing yet: W_g Kaiming-uniform with a = sqrt(5), LN_p
// the identity, all else zero.
nn::PromptList fresh_prompts(const nn::VisionTransformer& vit, int64_t prompts, const Draw& draw,
                             RandomSource& random);

// Part of the options of a method that has it.
struct PeftOptions {
  std::string kind = "adapter";
  int64_t rank = 64;
  double scale = 0.1;

  template <class Visitor>
  void visit(Visitor& v) {
    v("peft", kind, one_of({"adapter", "lora", "prompts"}),
      "what is trained in each block: an adapter beside the MLP, a LoRA of every matrix, or "
      "prompts "
      "that are mixed from the tokens, behind gates (NTK-CL's)");
    v("rank", rank, at_least(1),
      "r, bottleneck of the adapters or rank of the LoRA; number of a block's prompts");
    v("scale", scale, anything(),
      "s of the adapters' residual, or of the prompts that a block hands on; a LoRA has 1 / r");
  }
};

// One adapter a block, one LoRA a matrix, or prompts of each block.
class Peft {
 public:
  // ValueError for another kind, or a rank that does not fit.
  Peft(PeftOptions options, const nn::VisionTransformer& vit);

  // Begins anew with modules that change nothing yet, drawn for this task.
  void initialise(int64_t task, RandomSource& random);
  std::vector<at::Tensor> parameters() const;
  // Class features (B, C), with the graph of parameters that require gradients.
  at::Tensor features(const at::Tensor& images) const;
  void visit_state(const std::string& prefix, const StateVisitor& visitor);

 private:
  PeftOptions options_;
  const nn::VisionTransformer& vit_;
  // One of them, by the kind.
  std::optional<nn::AdapterList> adapters_;
  std::optional<nn::ComposedLora> lora_;  // its first module alone
  std::optional<nn::PromptList> prompts_;
};

}  // namespace ntkcl::methods
