#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/multiversion.h"

// Loops that several CPU kernels make, for their multiversioned functions.
namespace ntkcl::kernels {

// Partial results side by side, in a fixed order whatever the vector width of the machine.
constexpr int kLanes = 32;

template <class C>
NTKCL_INLINE C sum_of(const C* lanes) {
  C pairs[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    pairs[i] = lanes[i];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      pairs[i] += pairs[i + half];
    }
  }
  return pairs[0];
}

// sum of a[i] * b[i]; a may be b.
template <class T>
NTKCL_INLINE Compute<T> dot_loop(const T* a, const T* b, int64_t n) {
  Compute<T> lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += load(a[i + lane]) * load(b[i + lane]);
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    lanes[lane] += load(a[i + lane]) * load(b[i + lane]);
  }
  return sum_of(lanes);
}

template <class T>
NTKCL_INLINE void scale_loop(const T* __restrict__ x, Compute<T> factor, T* __restrict__ out,
                             int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = store<T>(load(x[i]) * factor);
  }
}

}  // namespace ntkcl::kernels
