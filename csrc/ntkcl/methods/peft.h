#pragma once

#include <optional>

#include "ntkcl/core/options.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/nn/adapter.h"
#include "ntkcl/nn/composed_lora.h"

// Modules that are trained in the frozen backbone, of the baselines.
namespace ntkcl::methods {

// Adapters that change nothing yet: W_down Kaiming-uniform with a = sqrt(5), all else zero.
nn::AdapterList fresh_adapters(const nn::VisionTransformer& vit, int64_t rank, const Draw& draw,
                               RandomSource& random);

// Part of the options of a method that has it.
struct PeftOptions {
  std::string kind = "adapter";
  int64_t rank = 64;
  double scale = 0.1;

  template <class Visitor>
  void visit(Visitor& v) {
    v("peft", kind, one_of({"adapter", "lora"}),
      "what is trained in each block: an adapter beside the MLP, or a LoRA of every matrix");
    v("rank", rank, at_least(1), "r, bottleneck of the adapters or rank of the LoRA");
    v("scale", scale, anything(), "s of the adapters' residual; a LoRA has 1 / r");
  }
};

// One adapter a block, or one LoRA a matrix.
class Peft {
 public:
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
  nn::AdapterList adapters_;              // where there is no LoRA
  std::optional<nn::ComposedLora> lora_;  // its first module alone
};

}  // namespace ntkcl::methods
