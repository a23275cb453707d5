#include "ntkcl/nn/frozen_mlp.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/held.h"
#include "ntkcl/ops/gelu.h"
#include "ntkcl/ops/residual_layer_norm.h"

namespace ntkcl::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Normalised normalise(const FrozenMlp& mlp, const Residual& hidden) {
  return layer_norm(hidden, mlp.norm_weight, mlp.norm_bias, mlp.fc1.weight.scalar_type());
}

// (stream, update or undefined) -> (value, MLP(LN2(value))); without an update the second alone, as
// the value is the stream.
struct FrozenMlpFunction : torch::autograd::Function<FrozenMlpFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& stream,
                               const std::optional<at::Tensor>& update, const FrozenMlp& mlp) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Normalised hidden = normalise(mlp, {stream, update.value_or(at::Tensor())});
    const at::Tensor inner = mlp.fc1(hidden.out);
    context->save_for_backward({hidden.value, hidden.mean, hidden.scale});
    context->saved_data["inner"] = mlp.recompute ? at::Tensor() : inner;
    context->saved_data["update"] = update ? c10::IValue(update->scalar_type()) : c10::IValue();
    context->set_materialize_grads(false);
    hold(context, mlp);
    const at::Tensor out = mlp.fc2(ops::gelu(inner));
    return update ? variable_list{hidden.value, out} : variable_list{out};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto mlp = held<FrozenMlp>(context);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& value = saved[0];
    const auto update = context->saved_data["update"].toOptional<at::ScalarType>();
    const at::Tensor value_grad = update ? grads[0] : at::Tensor(), &grad = grads.back();
    if (!grad.defined()) {  // the MLP's result went nowhere
      return {value_grad, update ? value_grad.to(*update) : at::Tensor(), at::Tensor()};
    }
    at::Tensor inner = context->saved_data["inner"].toTensor();
    if (!inner.defined()) {
      inner = mlp.fc1(normalise(mlp, {value}).out);
    }
    const at::Tensor dinner = ops::gelu_backward(mlp.fc2.input_gradient(grad), inner);
    const auto found = ops::residual_layer_norm_backward(
        mlp.fc1.input_gradient(dinner),
        value_grad.defined() ? std::optional(value_grad) : std::nullopt, value, saved[1], saved[2],
        mlp.norm_weight, update, /*affine=*/false);
    return {found.dx, update ? found.of_update() : at::Tensor(), at::Tensor()};
  }
};

// LN2 of `prompts` (B, P, C) takes the places of those in hidden.out: of all tokens only the
// prompts are written twice, and h itself is never copied. Returns what the way back needs of it.
Normalised put_prompts(const FrozenMlp& mlp, const Normalised& hidden, const at::Tensor& prompts) {
  Normalised own = normalise(mlp, {.stream = prompts});
  hidden.out.narrow(1, 1, prompts.size(1)).copy_(own.out);
  return own;
}

// (the mixing's parameters, stream, update) -> (h, MLP, new prompts).
struct PromptedMlpFunction : torch::autograd::Function<PromptedMlpFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& weight,
                               const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                               const at::Tensor& stream, const at::Tensor& update,
                               const ops::PromptMixing& mixing, const FrozenMlp& mlp) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Normalised hidden = normalise(mlp, {stream, update});
    const auto [prompts, mixed, mean, norm_scale] = ops::token_mix_prompts(hidden.value, mixing);
    const Normalised own = put_prompts(mlp, hidden, prompts);
    const at::Tensor inner = mlp.fc1(hidden.out);
    context->save_for_backward({weight, norm_weight, hidden.value, hidden.mean, hidden.scale,
                                prompts, mixed, mean, norm_scale, own.mean, own.scale});
    context->saved_data["inner"] = mlp.recompute ? at::Tensor() : inner;
    context->saved_data["update"] = update.scalar_type();
    context->saved_data["carried"] = mixing.carried;
    context->saved_data["scale"] = mixing.scale;
    context->mark_non_differentiable({prompts});
    context->set_materialize_grads(false);
    hold(context, mlp);
    return {hidden.value, mlp.fc2(ops::gelu(inner)), prompts};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto mlp = held<FrozenMlp>(context);
    const variable_list saved = context->get_saved_variables();
    const ops::PromptMixing mixing{.weight = saved[0],
                                   .norm_weight = saved[1],
                                   .norm_bias = {},
                                   .carried = context->saved_data["carried"].toInt(),
                                   .scale = context->saved_data["scale"].toDouble(),
                                   .insert = false};
    const at::Tensor &value = saved[2], &prompts = saved[5];
    const at::Tensor &value_grad = grads[0], &grad = grads[1];
    const auto update = context->saved_data["update"].toScalarType();
    if (!grad.defined()) {  // the MLP's result went nowhere
      return {at::Tensor(),
              at::Tensor(),
              at::Tensor(),
              value_grad,
              value_grad.defined() ? value_grad.to(update) : at::Tensor(),
              at::Tensor(),
              at::Tensor()};
    }
    at::Tensor inner = context->saved_data["inner"].toTensor();
    if (!inner.defined()) {
      const Normalised hidden = normalise(mlp, {.stream = value});
      put_prompts(mlp, hidden, prompts);
      inner = mlp.fc1(hidden.out);
    }
    const at::Tensor dnormed =
        mlp.fc1.input_gradient(ops::gelu_backward(mlp.fc2.input_gradient(grad), inner));
    // The prompts' rows go back through LN2 of their own and the mixing, to all tokens of h.
    at::Tensor of_prompts = dnormed.narrow(1, 1, mixing.carried);
    const at::Tensor dprompts =
        ops::residual_layer_norm_backward(of_prompts, std::nullopt, prompts, saved[9], saved[10],
                                          mlp.norm_weight, std::nullopt, /*affine=*/false)
            .dx;
    const auto of_mixing = ops::token_mix_prompts_backward(
        dprompts, value_grad.defined() ? std::optional(value_grad) : std::nullopt, value,
        {prompts, saved[6], saved[7], saved[8]}, mixing,
        {true, context->needs_input_grad(0), context->needs_input_grad(1),
         context->needs_input_grad(2)});
    of_prompts.zero_();
    const auto found = ops::residual_layer_norm_backward(dnormed, of_mixing[0], value, saved[3],
                                                         saved[4], mlp.norm_weight, update,
                                                         /*affine=*/false);
    const auto wanted = [&](size_t input) {
      return context->needs_input_grad(input) ? of_mixing[input + 1] : at::Tensor();
    };
    return {wanted(0),         wanted(1),    wanted(2),   found.dx,
            found.of_update(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Residual FrozenMlp::operator()(const Residual& hidden) const {
  if (differentiates(hidden.stream) || differentiates(hidden.update)) {
    const bool updated = hidden.update.defined();
    const variable_list results = FrozenMlpFunction::apply(
        hidden.stream, updated ? std::optional(hidden.update) : std::nullopt, *this);
    return {updated ? results[0] : hidden.stream, results.back()};
  }
  const Normalised normalised = normalise(*this, hidden);
  return {normalised.value, fc2(fc1.gelu(normalised.out))};
}

Residual FrozenMlp::with_prompts(const Residual& hidden, const ops::PromptMixing& mixing,
                                 at::Tensor* generated) const {
  NTKCL_ASSERT(hidden.update.defined() && mixing.carried == mixing.weight.size(0) &&
               !mixing.insert);
  at::Tensor prompts;
  Residual result;
  if (differentiates(hidden.stream) || differentiates(hidden.update) ||
      differentiates(mixing.weight) || differentiates(mixing.norm_weight) ||
      differentiates(mixing.norm_bias)) {
    const variable_list results =
        PromptedMlpFunction::apply(mixing.weight, mixing.norm_weight, mixing.norm_bias,
                                   hidden.stream, hidden.update, mixing, *this);
    result = {results[0], results[1]};
    prompts = results[2];
  } else {
    const Normalised normalised = normalise(*this, hidden);
    prompts = ops::token_mix_prompts(normalised.value, mixing).out;
    put_prompts(*this, normalised, prompts);
    result = {normalised.value, fc2(fc1.gelu(normalised.out))};
  }
  if (generated) {
    *generated = prompts;
  }
  return result;
}

}  // namespace ntkcl::nn
