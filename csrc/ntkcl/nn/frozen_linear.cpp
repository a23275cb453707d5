#include "ntkcl/nn/frozen_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>

#include "ntkcl/nn/held.h"
#include "ntkcl/ops/gelu.h"

namespace ntkcl::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Torch's own operators around oneDNN, which have no C++ header.
template <class Signature>
c10::TypedOperatorHandle<Signature> mkldnn(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool has_bfloat16() {
  static const bool has = mkldnn<bool()>("mkldnn::_is_mkldnn_bf16_supported").call();
  return has;
}

// oneDNN frees a packed weight through whatever allocator torch has then, so it must come from
// torch's own, whatever is installed now.
class TorchsOwnAllocator {
 public:
  TorchsOwnAllocator() { c10::SetCPUAllocator(c10::GetDefaultCPUAllocator()); }
  ~TorchsOwnAllocator() { c10::SetCPUAllocator(installed_); }
  TorchsOwnAllocator(const TorchsOwnAllocator&) = delete;
  TorchsOwnAllocator& operator=(const TorchsOwnAllocator&) = delete;

 private:
  c10::Allocator* installed_ = c10::GetCPUAllocator();
};

at::Tensor reorder(const at::Tensor& weight, int64_t rows) {
  static const auto op = mkldnn<at::Tensor(const at::Tensor&, std::optional<int64_t>)>(
      "mkldnn::_reorder_linear_weight");
  const at::Tensor contiguous = weight.contiguous();
  const TorchsOwnAllocator own;
  return op.call(contiguous, rows);
}

// activation: "none" or "gelu".
at::Tensor product(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias,
                   const char* activation) {
  static const auto op =
      mkldnn<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                        std::string_view, c10::List<std::optional<at::Scalar>>,
                        std::optional<std::string_view>)>("mkldnn::_linear_pointwise");
  return op.call(x.contiguous(), packed, bias.defined() ? std::optional(bias) : std::nullopt,
                 activation, c10::List<std::optional<at::Scalar>>(), "none");
}

struct FrozenLinearFunction : torch::autograd::Function<FrozenLinearFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const FrozenLinear& linear) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    hold(context, linear);
    return linear(x);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {held<FrozenLinear>(context).input_gradient(grads[0]), at::Tensor()};
  }
};

}  // namespace

at::Tensor FrozenLinear::operator()(const at::Tensor& x) const {
  if (differentiates(x)) {
    return FrozenLinearFunction::apply(x, *this);
  }
  return uses_packed(x) ? product(x, packed, bias, "none") : at::linear(x, weight, bias);
}

at::Tensor FrozenLinear::input_gradient(const at::Tensor& grad) const {
  return uses_packed(grad) ? product(grad, packed_transposed, {}, "none")
                           : at::matmul(grad, weight);
}

at::Tensor FrozenLinear::gelu(const at::Tensor& x) const {
  return uses_packed(x) ? product(x, packed, bias, "gelu") : ops::gelu((*this)(x));
}

FrozenLinear FrozenLinear::outputs(int64_t first, int64_t count) const {
  return {.weight = weight.narrow(0, first, count), .bias = bias.narrow(0, first, count)};
}

FrozenLinear FrozenLinear::pack(int64_t rows) const {
  const bool packs = weight.is_cpu() && at::globalContext().userEnabledMkldnn() &&
                     (weight.scalar_type() == at::kFloat ||
                      (weight.scalar_type() == at::kBFloat16 && has_bfloat16()));
  if (!packs) {
    return *this;
  }
  FrozenLinear copy = *this;
  copy.packed = reorder(weight, rows);
  copy.packed_transposed = reorder(weight.t(), rows);
  return copy;
}

}  // namespace ntkcl::nn
