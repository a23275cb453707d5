#include "ntkcl/nn/frozen_linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>

#include "ntkcl/core/error.h"
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

// MKL multiplies wide float32 matrices faster on Intel's processors, and on no other's. Narrow ones
// gain more from a bias and GELU inside oneDNN's product.
bool mkl_is_faster(const at::Tensor& weight) {
#if defined(__x86_64__)
  constexpr int64_t kWide = int64_t{512} * 512;
  static const bool intel = __builtin_cpu_is("intel");
  return intel && at::hasMKL() && weight.numel() >= kWide;
#else
  (void)weight;
  return false;
#endif
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

// x W^T + b of rows quantised, in x's type; the weight's are.
at::Tensor float8_product(const at::Tensor& x, const ops::Float8Rows& weight,
                          const at::Tensor& bias) {
  const int64_t out = weight.values.size(0);
  const ops::Float8Rows rows = ops::float8_rows(x.reshape({-1, x.size(-1)}));
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  if (ops::multiplies_float8(x.device())) {
    return at::_scaled_mm(rows.values, weight.values.t(), rows.scale, weight.scale.t(),
                          bias.defined() ? std::optional(bias) : std::nullopt, std::nullopt,
                          x.scalar_type())
        .view(sizes);
  }
  at::Tensor y = at::mm(rows.values.to(at::kFloat), weight.values.to(at::kFloat).t());
  y.mul_(rows.scale).mul_(weight.scale.t());
  if (bias.defined()) {
    y.add_(bias);
  }
  return y.to(x.scalar_type()).view(sizes);
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
  if (float8.values.defined()) {
    return float8_product(x, float8, bias);
  }
  return uses_packed(x) ? product(x, packed, bias, "none") : at::linear(x, weight, bias);
}

at::Tensor FrozenLinear::input_gradient(const at::Tensor& grad) const {
  if (float8.values.defined()) {
    return float8_product(grad, float8_transposed, {});
  }
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
  const at::ScalarType type = weight.scalar_type();
  const bool packs =
      weight.is_cpu() && at::globalContext().userEnabledMkldnn() &&
      ((type == at::kFloat && !mkl_is_faster(weight)) || (type == at::kBFloat16 && has_bfloat16()));
  if (!packs) {
    return *this;
  }
  FrozenLinear copy = *this;
  copy.packed = reorder(weight, rows);
  copy.packed_transposed = reorder(weight.t(), rows);
  return copy;
}

FrozenLinear FrozenLinear::quantise() const {
  NTKCL_CHECK(weight.size(0) % 16 == 0 && weight.size(1) % 16 == 0, "float8",
              "expected frozen matrices with sides that are multiples of 16, got ", weight.sizes());
  FrozenLinear copy = *this;
  copy.float8 = ops::float8_rows(weight);
  copy.float8_transposed = ops::float8_rows(weight.t());
  return copy;
}

}  // namespace ntkcl::nn
