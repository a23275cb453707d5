#pragma once

#include "ntkcl/kernels/vec4.cuh"

// Sums over a warp, and rows read and written one or four elements at a time.
namespace ntkcl::kernels {

constexpr int kWarp = 32;

// Every lane gets the sum, added up in a fixed order.
template <class C>
__device__ inline C warp_sum(C value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

// One or four elements from p on, computed with as Compute<T>.
template <class T, int kElements>
__device__ inline void read(const T* p, Compute<T> (&values)[kElements]) {
  if constexpr (kElements == 4) {
    const Vec4<T> loaded = load4(p);
    for (int j = 0; j < 4; ++j) {
      values[j] = load(loaded.v[j]);
    }
  } else {
    values[0] = load(*p);
  }
}

template <class T, int kElements>
__device__ inline void write(T* p, const Compute<T> (&values)[kElements]) {
  if constexpr (kElements == 4) {
    Vec4<T> stored;
    for (int j = 0; j < 4; ++j) {
      stored.v[j] = store<T>(values[j]);
    }
    store4(p, stored);
  } else {
    *p = store<T>(values[0]);
  }
}

}  // namespace ntkcl::kernels
