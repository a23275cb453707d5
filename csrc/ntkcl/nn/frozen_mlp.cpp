#include "ntkcl/nn/frozen_mlp.h"

#include <ATen/ATen.h>

#include "ntkcl/nn/held.h"

namespace ntkcl::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Normalised {
  at::Tensor out, mean, rstd;
};

Normalised normalise(const FrozenMlp& mlp, const at::Tensor& hidden) {
  auto [out, mean, rstd] = at::native_layer_norm(hidden, {hidden.size(-1)}, mlp.norm_weight,
                                                 mlp.norm_bias, kLayerNormEps);
  return {out.to(mlp.fc1.weight.scalar_type()), mean, rstd};
}

struct FrozenMlpFunction : torch::autograd::Function<FrozenMlpFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden,
                            const FrozenMlp& mlp) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Normalised normalised = normalise(mlp, hidden);
    const at::Tensor inner = mlp.fc1(normalised.out);
    context->save_for_backward({hidden, normalised.mean, normalised.rstd});
    context->saved_data["inner"] = mlp.recompute ? at::Tensor() : inner;
    hold(context, mlp);
    return mlp.fc2(at::gelu(inner));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto mlp = held<FrozenMlp>(context);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& hidden = saved[0];
    at::Tensor inner = context->saved_data["inner"].toTensor();
    if (!inner.defined()) {
      inner = mlp.fc1(normalise(mlp, hidden).out);
    }
    const at::Tensor dinner = at::gelu_backward(mlp.fc2.input_gradient(grads[0]), inner);
    const at::Tensor dnorm = mlp.fc1.input_gradient(dinner).to(hidden.scalar_type());
    return {std::get<0>(at::native_layer_norm_backward(dnorm, hidden, {hidden.size(-1)}, saved[1],
                                                       saved[2], mlp.norm_weight, mlp.norm_bias,
                                                       {true, false, false})),
            at::Tensor()};
  }
};

}  // namespace

at::Tensor FrozenMlp::operator()(const at::Tensor& hidden) const {
  if (differentiates(hidden)) {
    return FrozenMlpFunction::apply(hidden, *this);
  }
  return fc2(fc1.gelu(normalise(*this, hidden).out));
}

}  // namespace ntkcl::nn
