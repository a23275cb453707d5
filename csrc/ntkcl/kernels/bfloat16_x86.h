#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/exp.h"
#include "ntkcl/kernels/multiversion.h"

#ifdef NTKCL_X86_VERSIONS
#include <immintrin.h>

// Vectors of bfloat16 on processors that round to it themselves. Instructions have masks of all
// lanes where gcc 12's own header gives a warning (maybe-uninitialized) without.
namespace ntkcl::kernels {

constexpr __mmask16 kAllLanes = 0xFFFF;

// Sixteen numbers, each in the lower half of 32 bits.
NTKCL_X86_BF16 NTKCL_INLINE __m512i lower_halves(const BFloat16* x) {
  const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_maskz_cvtepu16_epi32(kAllLanes, sixteen);
}

// The same, rounded.
NTKCL_X86_BF16 NTKCL_INLINE __m512i lower_halves(const float* x) {
  const __m256i sixteen = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x));
  return _mm512_maskz_cvtepu16_epi32(kAllLanes, sixteen);
}

// Of pairs: the first number of each, the second of each.
NTKCL_X86_BF16 NTKCL_INLINE __m512 firsts(__m512i pairs) {
  return (__m512)_mm512_maskz_slli_epi32(kAllLanes, pairs, 16);
}
NTKCL_X86_BF16 NTKCL_INLINE __m512 seconds(__m512i pairs) {
  return (__m512)_mm512_maskz_and_epi32(kAllLanes, pairs, _mm512_set1_epi32(-65536));
}

// Thirty-two numbers, `low` before `high`. Those below the least normal number become 0.
NTKCL_X86_BF16 NTKCL_INLINE __m512i rounded_pair(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Numbers i and i + 16 of x as pair i.
NTKCL_X86_BF16 NTKCL_INLINE __m512i as_pairs(__m512i x) {
  alignas(64) static constexpr int16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), x);
}

// 2^x of those in `some`, -126 <= x <= 0, as power_near() of exp.h; 0 of the others. NaN stays NaN.
NTKCL_X86_BF16 NTKCL_INLINE __m512 power_near(__mmask16 some, __m512 x) {
  const __m512 round = _mm512_set1_ps(kRound);
  const __m512 n = (x + round) - round, r = x - n;
  __m512 p = _mm512_set1_ps(kPowerNear[0]);
#pragma GCC unroll 4
  for (int i = 1; i < 5; ++i) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kPowerNear[i]));
  }
  return _mm512_maskz_scalef_ps(some, p, n);
}

}  // namespace ntkcl::kernels
#endif
