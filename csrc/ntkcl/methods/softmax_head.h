#pragma once

#include "ntkcl/core/options.h"
#include "ntkcl/methods/method.h"

namespace ntkcl::methods {

// Part of the options of a method that has it.
struct SoftmaxHeadOptions {
  std::string kind = "cosine";
  double logit_scale = 20.0;

  template <class Visitor>
  void visit(Visitor& v) {
    v("head", kind, one_of({"linear", "cosine"}),
      "logits: W f + b, or logit_scale times the cosines of f and the rows of W");
    v("logit_scale", logit_scale, above(0), "factor on the cosines");
  }
};

// A classifier that grows by the classes of each task, under the cross-entropy.
class SoftmaxHead {
 public:
  SoftmaxHead(SoftmaxHeadOptions options, int64_t width, const at::TensorOptions& like);

  int64_t classes() const { return weight_.size(0); }
  // Keeps the first `kept` classes and draws `more` after them, for this task.
  void grow(int64_t kept, int64_t more, int64_t task, RandomSource& random);
  // Groups "peft", of these parameters, and "head", of the rows of the classes in `range`.
  std::vector<optim::ParameterGroup> trained(const std::vector<at::Tensor>& peft, ClassRange range);
  // Cross-entropy of features (B, C) over the classes that are trained, with its gradients.
  Losses gradients(const at::Tensor& features, const at::Tensor& labels,
                   TaskServices& services) const;
  at::Tensor logits(const at::Tensor& features) const;  // (B, classes)
  void visit_state(const std::string& prefix, const StateVisitor& visitor);

 private:
  at::Tensor logits(const at::Tensor& features, const at::Tensor& weight,
                    const at::Tensor& bias) const;

  SoftmaxHeadOptions options_;
  at::Tensor weight_;  // (classes, C)
  at::Tensor bias_;    // (classes), zero with cosines
  // The rows that are trained, parts of the above.
  int64_t first_trained_ = 0;
  at::Tensor trained_weight_, trained_bias_;
};

}  // namespace ntkcl::methods
