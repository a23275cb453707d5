#include "ntkcl/nn/frozen_mlp.h"

#include <ATen/ATen.h>

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

}  // namespace ntkcl::nn
