#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/multiversion.h"

// exp for loops that the compiler vectorises.
namespace ntkcl::kernels {

constexpr float kExpEnd = -87.0F;  // exp of less is no normal float32

constexpr float kLog2E = 1.44269504F;
constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the low bits

// 2^n of shifted = n + kRound, -127 < n < 128.
NTKCL_INLINE float power_of_two(float shifted) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000U);
}

// exp(x + low) for kExpEnd <= x <= 0 and a low that is small beside x, to 2 units in the last
// place: 2^n times a polynomial in x - n log 2. NaN stays NaN.
NTKCL_INLINE float exp_in_range(float x, float low = -0.0F) {
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = ((x - n * 0.693359375F) + n * 2.12194440e-4F) + low;  // log 2 in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  return p * power_of_two(shifted);
}

// 2^r for -0.5 <= r <= 0.5, to 2^-18: factors of r^4 and down.
constexpr float kPowerNear[5] = {0.00957009895F, 0.0559178601F, 0.240247449F, 0.693121815F,
                                 0.999999261F};

// 2^x for -126 <= x <= 0, to 2^-18: enough of what is rounded to bfloat16. NaN stays NaN.
NTKCL_INLINE float power_near(float x) {
  const float shifted = x + kRound;
  const float r = x - (shifted - kRound);
  float p = kPowerNear[0];
#pragma GCC unroll 4
  for (int i = 1; i < 5; ++i) {
    p = p * r + kPowerNear[i];
  }
  return p * power_of_two(shifted);
}

// exp(x) for x <= 0 as exact as a result of type T asks for; exactly 0 below kExpEnd.
NTKCL_INLINE float exp_of(float x, float) {
  const float value = exp_in_range(x < kExpEnd ? kExpEnd : x);
  return x < kExpEnd ? 0.0F : value;
}
NTKCL_INLINE float exp_of(float x, BFloat16) {
  const float value = power_near((x < kExpEnd ? kExpEnd : x) * kLog2E);
  return x < kExpEnd ? 0.0F : value;
}
NTKCL_INLINE double exp_of(double x, double) {
  return std::exp(x);
}

}  // namespace ntkcl::kernels
