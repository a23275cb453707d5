#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

// For autograd functions of frozen weights: the graph holds the weights as they are, not as inputs.
// Heavy to include: for .cpp files only.
namespace ntkcl::nn {

template <class Weights>
struct Held : torch::CustomClassHolder {
  explicit Held(const Weights& w) : weights(w) {}
  Weights weights;
};

template <class Weights>
void hold(torch::autograd::AutogradContext* context, const Weights& weights) {
  context->saved_data["weights"] =
      c10::IValue::make_capsule(c10::make_intrusive<Held<Weights>>(weights));
}

template <class Weights>
Weights held(torch::autograd::AutogradContext* context) {
  const auto capsule = context->saved_data["weights"].toCapsule();
  return static_cast<const Held<Weights>&>(*capsule).weights;
}

inline bool differentiates(const at::Tensor& x) {
  return at::GradMode::is_enabled() && x.defined() && x.requires_grad();
}

}  // namespace ntkcl::nn
