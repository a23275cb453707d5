#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

#include "ntkcl/core/philox.h"

// The element types of kernels: double, float and BFloat16, which is stored as 16 bits and
// computed with as float. Compute<T> is the type of the arithmetic.
namespace ntkcl::kernels {

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

NTKCL_HOST_DEVICE inline double load(double value) {
  return value;
}
NTKCL_HOST_DEVICE inline float load(float value) {
  return value;
}
NTKCL_HOST_DEVICE inline float load(BFloat16 value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(uint32_t{value.bits} << 16);
#else
  return std::bit_cast<float>(uint32_t{value.bits} << 16);
#endif
}

// To the nearest value of the element type, ties to even; NaN stays NaN.
template <class T>
NTKCL_HOST_DEVICE inline T store(Compute<T> value) {
  return static_cast<T>(value);
}
template <>
NTKCL_HOST_DEVICE inline BFloat16 store<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7FC0u : rounded)};
#endif
}

}  // namespace ntkcl::kernels
