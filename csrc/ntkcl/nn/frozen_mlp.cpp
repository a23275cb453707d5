#include "ntkcl/nn/frozen_mlp.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

namespace ntkcl::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kLayerNormEps = 1e-6;

struct Normalised {
  at::Tensor out, mean, rstd;
};

Normalised normalise(const FrozenMlp& mlp, const at::Tensor& hidden) {
  auto [out, mean, rstd] = at::native_layer_norm(hidden, {hidden.size(-1)}, mlp.norm_weight,
                                                 mlp.norm_bias, kLayerNormEps);
  return {out.to(mlp.fc1.weight.scalar_type()), mean, rstd};
}

// What the graph holds of the weights.
struct Holder : torch::CustomClassHolder {
  explicit Holder(const FrozenMlp& m) : mlp(m) {}
  FrozenMlp mlp;
};

struct FrozenMlpFunction : torch::autograd::Function<FrozenMlpFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden,
                            const FrozenMlp& mlp) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Normalised normalised = normalise(mlp, hidden);
    const at::Tensor inner = mlp.fc1(normalised.out);
    context->save_for_backward({hidden, normalised.mean, normalised.rstd});
    context->saved_data["inner"] = mlp.recompute ? at::Tensor() : inner;
    context->saved_data["mlp"] = c10::IValue::make_capsule(c10::make_intrusive<Holder>(mlp));
    return mlp.fc2(at::gelu(inner));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const c10::intrusive_ptr<torch::CustomClassHolder> held =
        context->saved_data["mlp"].toCapsule();
    const FrozenMlp& mlp = static_cast<const Holder&>(*held).mlp;
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
  if (at::GradMode::is_enabled() && hidden.requires_grad()) {
    return FrozenMlpFunction::apply(hidden, *this);
  }
  return fc2(fc1.gelu(normalise(*this, hidden).out));
}

}  // namespace ntkcl::nn
