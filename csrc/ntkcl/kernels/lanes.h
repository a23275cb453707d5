#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/multiversion.h"

// Loops that several CPU kernels make, for their multiversioned functions.
namespace ntkcl::kernels {

// Partial results side by side, in a fixed order whatever the vector width of the machine.
constexpr int kLanes = 32;

// Halves are laid together until one lane is left. A loop over them would not be unrolled.
template <int kHalf = kLanes / 2, class C, class Together>
NTKCL_INLINE void fold(C* lanes, const Together& together) {
  for (int i = 0; i < kHalf; ++i) {
    lanes[i] = together(lanes[i], lanes[i + kHalf]);
  }
  if constexpr (kHalf > 1) {
    fold<kHalf / 2>(lanes, together);
  }
}

template <class C>
NTKCL_INLINE C sum_of(C* lanes) {
  fold(lanes, [](C a, C b) NTKCL_INLINE_LAMBDA { return a + b; });
  return lanes[0];
}

template <class C>
NTKCL_INLINE C largest_of(C* lanes) {
  fold(lanes, [](C a, C b) NTKCL_INLINE_LAMBDA { return b > a ? b : a; });
  return lanes[0];
}

// sum of term(i), 0 <= i < n.
template <class C, class Term>
NTKCL_INLINE C sum_loop(int64_t n, const Term& term) {
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += term(i + lane);
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    lanes[lane] += term(i + lane);
  }
  return sum_of(lanes);
}

// sum of a[i] * b[i]; a may be b.
template <class T>
NTKCL_INLINE Compute<T> dot_loop(const T* a, const T* b, int64_t n) {
  return sum_loop<Compute<T>>(
      n, [=](int64_t i) NTKCL_INLINE_LAMBDA { return load(a[i]) * load(b[i]); });
}

template <class T>
NTKCL_INLINE void scale_loop(const T* __restrict__ x, Compute<T> factor, T* __restrict__ out,
                             int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = store<T>(load(x[i]) * factor);
  }
}

}  // namespace ntkcl::kernels
