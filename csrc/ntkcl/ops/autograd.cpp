#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ntkcl/ops/attention.h"
#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/section_cosine.h"

// The autograd functions of all operators, in one file because custom_function.h costs 10 s.
namespace ntkcl::ops {
namespace {

using at::AutoDispatchBelowADInplaceOrView;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct AttentionFunction : Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv, int64_t heads,
                            const std::optional<at::Tensor>& gate, int64_t prompts) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({qkv, gate.value_or(at::Tensor())});
    context->saved_data["heads"] = heads;
    context->saved_data["prompts"] = prompts;
    return attention(qkv, heads, gate, prompts);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Variable& gate = saved[1];
    auto [dqkv, dgate] =
        attention_backward(grads[0], saved[0], context->saved_data["heads"].toInt(),
                           gate.defined() ? std::optional(gate) : std::nullopt,
                           context->saved_data["prompts"].toInt());
    return {dqkv, Variable(), gate.defined() ? dgate : Variable(), Variable()};
  }
};

struct BiasReluDropoutFunction : Function<BiasReluDropoutFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& bias,
                            const std::optional<at::Tensor>& mask,
                            const std::optional<at::Tensor>& key, double p) {
    const AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor y = bias_relu_dropout(x, bias, mask, key, p);
    context->save_for_backward({y});
    context->saved_data["p"] = mask || key ? p : 0.0;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor y = context->get_saved_variables()[0];
    auto [dx, dbias] = bias_relu_dropout_backward(grads[0], y, context->saved_data["p"].toDouble());
    return {dx, dbias, Variable(), Variable(), Variable()};
  }
};

struct SectionCosineFunction : Function<SectionCosineFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& prototypes, const at::Tensor& weights) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, prototypes, weights});
    return section_cosine(x, prototypes, weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &prototypes = saved[1], &weights = saved[2];
    Variable dx, dprototypes, dweights;
    if (context->needs_input_grad(1)) {
      std::tie(dprototypes, dweights) =
          section_cosine_backward(grads[0].t(), prototypes, x, weights);
    }
    // The gradient of the weights comes with either.
    if (context->needs_input_grad(0) ||
        (context->needs_input_grad(2) && !context->needs_input_grad(1))) {
      std::tie(dx, dweights) = section_cosine_backward(grads[0], x, prototypes, weights);
    }
    return {dx, dprototypes, dweights};
  }
};

at::Tensor attention_autograd(const at::Tensor& qkv, int64_t heads,
                              const std::optional<at::Tensor>& gate, int64_t prompts) {
  return AttentionFunction::apply(qkv, heads, gate, prompts);
}

at::Tensor bias_relu_dropout_autograd(const at::Tensor& x, const at::Tensor& bias,
                                      const std::optional<at::Tensor>& mask,
                                      const std::optional<at::Tensor>& key, double p) {
  return BiasReluDropoutFunction::apply(x, bias, mask, key, p);
}

at::Tensor section_cosine_autograd(const at::Tensor& x, const at::Tensor& prototypes,
                                   const at::Tensor& weights) {
  return SectionCosineFunction::apply(x, prototypes, weights);
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, Autograd, m) {
  m.impl("attention", &attention_autograd);
  m.impl("bias_relu_dropout", &bias_relu_dropout_autograd);
  m.impl("section_cosine", &section_cosine_autograd);
  // Second derivatives are an error when asked for, not silently zero.
  m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("bias_relu_dropout_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("section_cosine_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace ntkcl::ops
