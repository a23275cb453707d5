#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::ops {

// The dropout mask that a key stands for, the same that bias_relu_dropout draws from it:
//
//   key   one int64; the mask is made on its device
//   size  the mask's shape
//   p     the probability of being dropped, 0 <= p < 1
//   ->    uint8 of shape `size`: element i in row-major order is 1 (kept) iff
//         uniform24(philox(key, i / 4).v[i % 4]) >= p, else 0
//
// Errors: ValueError (a negative size, p, the key's shape), TypeError (the key's type).
at::Tensor philox_keep_mask(const at::Tensor& key, at::IntArrayRef size, double p);

namespace detail {
void check_philox_keep_mask(const at::Tensor& key, c10::SymIntArrayRef size, double p);
}  // namespace detail

}  // namespace ntkcl::ops
