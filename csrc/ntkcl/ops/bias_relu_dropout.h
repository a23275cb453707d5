#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ntkcl::ops {

// y = relu(x + bias) * keep / (1 - p): the middle of an adapter (NTK-CL section 2).
//
//   x      (..., r) float32, float64 or bfloat16
//   bias   (r) of x's type; or (g, r) for x (g, ..., r): one for each of g adapters side by side
//   mask   of x's shape, uint8 or bool, 0 where dropped; or
//   key    one int64, on the CPU or on x's device: element i of the contiguous x is kept iff
//          uniform24(philox(key, i / 4).v[i % 4]) >= p; the same elements on all devices.
//          Neither: no dropout, and p is not used.
//   p      the probability of being dropped, 0 <= p < 1
//   ->     (..., r), contiguous
//
// A key in device memory is read when the kernel runs, so a captured graph can be replayed with
// other keys. NaN of kept elements goes through.
// Errors: ValueError (shapes, devices, p, both mask and key), TypeError (element types).
at::Tensor bias_relu_dropout(const at::Tensor& x, const at::Tensor& bias,
                             const std::optional<at::Tensor>& mask,
                             const std::optional<at::Tensor>& key, double p);

// Needs the result alone, as y > 0 exactly where the gradient passes:
//   dx = y > 0 ? grad / (1 - p) : 0   (..., r);   dbias = sum of dx over all but the last   (r),
//   or (groups, r) with groups >= 0: over all between the first and the last
// The sum's order depends on the sizes only, so equal inputs give equal bits. With no dropout, p
// must be 0.
std::tuple<at::Tensor, at::Tensor> bias_relu_dropout_backward(const at::Tensor& grad,
                                                              const at::Tensor& y, double p,
                                                              int64_t groups = -1);

namespace detail {
void check_bias_relu_dropout(const at::Tensor& x, const at::Tensor& bias,
                             const std::optional<at::Tensor>& mask,
                             const std::optional<at::Tensor>& key, double p);
void check_bias_relu_dropout_backward(const at::Tensor& grad, const at::Tensor& y, double p,
                                      int64_t groups);
}  // namespace detail

}  // namespace ntkcl::ops
