#pragma once

#include "ntkcl/kernels/element.h"

// y = x Phi(x), with Phi the normal distribution, and dx = grad (Phi(x) + x Phi'(x)); see
// ops/gelu.h.
namespace ntkcl::kernels {

constexpr double kInverseSqrt2 = 0.70710678118654752440;
constexpr double kInverseSqrt2Pi = 0.39894228040143267794;

template <class T>
struct Gelu {
  const T* x = nullptr;
  T* y = nullptr;
  int64_t size = 0;
};

template <class T>
struct GeluBackward {
  const T* grad = nullptr;
  const T* x = nullptr;
  T* dx = nullptr;
  int64_t size = 0;
};

}  // namespace ntkcl::kernels
