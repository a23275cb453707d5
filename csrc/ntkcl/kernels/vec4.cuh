#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"

// Four neighbouring elements as one memory access (two for double), for device code.
namespace ntkcl::kernels {

template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Vec4 {
  T v[4];
};

// Whether p may be read as Vec4<T>; a null pointer may.
template <class T>
inline bool is_vec4_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vec4<T>) == 0;
}

template <class T>
__device__ inline Vec4<T> load4(const T* p) {
  return *reinterpret_cast<const Vec4<T>*>(p);
}

template <class T>
__device__ inline void store4(T* p, const Vec4<T>& value) {
  *reinterpret_cast<Vec4<T>*>(p) = value;
}

}  // namespace ntkcl::kernels
