#pragma once

#include <type_traits>

#include "ntkcl/kernels/residual_layer_norm.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/residual_layer_norm.h"

// From tensors to the kernels' arguments, which are the same for all devices. The tensors are
// contiguous and not empty.
namespace ntkcl::ops::detail {

// Calls function(S{}, U{}, O{}) with one of NTKCL_FOR_LAYER_NORM_TYPES.
template <class Function>
void with_layer_norm_types(at::ScalarType stream, at::ScalarType update, at::ScalarType out,
                           Function&& function) {
  with_element_type(stream, [&](auto s) {
    if constexpr (std::is_same_v<decltype(s), float>) {
      const auto with_update = [&](auto u) {
        return out == stream ? function(s, u, s) : function(s, u, kernels::BFloat16{});
      };
      return update == stream ? with_update(s) : with_update(kernels::BFloat16{});
    } else {
      return function(s, s, s);
    }
  });
}

// Calls run(kernels::ResidualLayerNorm<S, U, O>). update may be undefined.
template <class Run>
void with_forward_arguments(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                            const at::Tensor& bias, double eps, const ResidualLayerNorm& results,
                            const Run& run) {
  const auto update_type = update.defined() ? update.scalar_type() : x.scalar_type();
  with_layer_norm_types(x.scalar_type(), update_type, results.out.scalar_type(),
                        [&](auto s, auto u, auto o) {
                          using S = decltype(s);
                          using U = decltype(u);
                          using O = decltype(o);
                          run(kernels::ResidualLayerNorm<S, U, O>{
                              .x = elements<S>(x),
                              .update = update.defined() ? elements<U>(update) : nullptr,
                              .weight = elements<S>(weight),
                              .bias = elements<S>(bias),
                              .sum = update.defined() ? mutable_elements<S>(results.sum) : nullptr,
                              .out = mutable_elements<O>(results.out),
                              .mean = mutable_elements<kernels::Compute<S>>(results.mean),
                              .scale = mutable_elements<kernels::Compute<S>>(results.scale),
                              .rows = results.mean.numel(),
                              .width = x.size(-1),
                              .eps = eps});
                        });
}

// Calls run(kernels::ResidualLayerNormBackward<S, U, O>). sum_grad may be undefined, dupdate empty.
template <class Run>
void with_backward_arguments(const at::Tensor& grad, const at::Tensor& sum_grad,
                             const at::Tensor& sum, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& weight, const at::Tensor& dx,
                             const at::Tensor& dupdate, const Run& run) {
  with_layer_norm_types(
      sum.scalar_type(), dupdate.scalar_type(), grad.scalar_type(), [&](auto s, auto u, auto o) {
        using S = decltype(s);
        using U = decltype(u);
        using O = decltype(o);
        run(kernels::ResidualLayerNormBackward<S, U, O>{
            .grad = elements<O>(grad),
            .sum_grad = sum_grad.defined() ? elements<S>(sum_grad) : nullptr,
            .sum = elements<S>(sum),
            .mean = elements<kernels::Compute<S>>(mean),
            .scale = elements<kernels::Compute<S>>(scale),
            .weight = elements<S>(weight),
            .dx = mutable_elements<S>(dx),
            .dupdate = dupdate.numel() > 0 ? mutable_elements<U>(dupdate) : nullptr,
            .rows = mean.numel(),
            .width = sum.size(-1)});
      });
}

}  // namespace ntkcl::ops::detail
