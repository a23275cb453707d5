#include "ntkcl/kernels/gelu_cpu.h"

#include <bit>
#include <cmath>
#include <iterator>
#include <type_traits>

#include "ntkcl/kernels/bfloat16_x86.h"
#include "ntkcl/kernels/exp.h"
#include "ntkcl/kernels/multiversion.h"

// Beyond t >= 0 the normal distribution has the tail exp(-t^2 / 2) Q(t) with a smooth Q: one
// exponential, one division and one polynomial give it with its relative accuracy, however small it
// is, and its slope as well. Neither result needs a branch.
namespace ntkcl::kernels {
namespace {

constexpr float kHalfLog2E = 0.5F * kLog2E;
constexpr float kEnd = 13.19F;  // t^2 / 2 is just within exp_in_range; the tail beyond is 0

// Q(t) = P(s) / (t + kCentre), s = (t - kCentre) / (t + kCentre), fitted for the least largest
// relative error: 2^-26 for float, 2^-14 for what is rounded to bfloat16.
template <class T>
struct Fit {
  static constexpr float kCentre = 4.75F;
  static constexpr float kP[] = {0.7664162818F,  -0.6535893561F,   0.4720644867F,
                                 -0.2841836525F, 0.1381062418F,    -0.05063037017F,
                                 0.0115444403F,  0.0002306604311F, -0.001304182863F};
};
template <>
struct Fit<BFloat16> {
  static constexpr float kCentre = 4.0F;
  static constexpr float kP[] = {0.7552831514F, -0.6075713954F, 0.3870245771F, -0.1898468607F,
                                 0.06017331407F};
};

// exp(-t^2 / 2), 0 <= t <= kEnd, to 2 units in the last place.
NTKCL_INLINE float bell(float t, float) {
  // t^2 = high^2 + (t - high)(t + high), the first exactly.
  const float high = std::bit_cast<float>(std::bit_cast<uint32_t>(t) & 0xFFFFF000U);
  return exp_in_range(-0.5F * high * high, -0.5F * (t - high) * (t + high));
}

NTKCL_INLINE float bell(float t, BFloat16) {
  return power_near(-kHalfLog2E * t * t);
}

// Of t = min(|x|, kEnd): the tail 1 - Phi(t), t times it, and t Phi'(t).
template <class C>
struct Beyond {
  C tail, t_tail, t_slope;
};

template <class T>
NTKCL_INLINE Beyond<float> beyond(float x, T) {
  // As integers, magnitudes are ordered alike, and the compiler makes no branch.
  const uint32_t size = std::bit_cast<uint32_t>(x) & 0x7FFFFFFFU;
  const uint32_t end = std::bit_cast<uint32_t>(kEnd);
  const float t = std::bit_cast<float>(size < end ? size : end);
  const float value = bell(t, T{});
  const float e = size < end ? value : 0.0F;

  const float inverse = 1.0F / (t + Fit<T>::kCentre);
  const float s = (t - Fit<T>::kCentre) * inverse;
  float p = 0.0F;
#pragma GCC unroll 9
  for (int i = std::size(Fit<T>::kP) - 1; i >= 0; --i) {
    p = p * s + Fit<T>::kP[i];
  }
  const float tail = e * (p * inverse);
  return {tail, t * tail, e * (t * static_cast<float>(kInverseSqrt2Pi))};
}

NTKCL_INLINE Beyond<double> beyond(double x, double) {
  const double t = std::fabs(x);
  const double tail = 0.5 * std::erfc(t * kInverseSqrt2), e = std::exp(-0.5 * t * t);
  return {tail, tail > 0 ? t * tail : 0, e > 0 ? t * kInverseSqrt2Pi * e : 0};
}

// x Phi(x) = relu(x) - t (1 - Phi(t)).
template <class T>
NTKCL_INLINE void forward_loop(const T* __restrict__ x, T* __restrict__ y, int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    const C v = load(x[i]);
    const Beyond<C> b = beyond(v, T{});
    y[i] = store<T>((v < 0 ? C{0} : v) - b.t_tail);
  }
}

// Phi(x) + x Phi'(x) is, for x < 0, (1 - Phi(t)) - t Phi'(t), and 1 less that for x > 0.
template <class T>
NTKCL_INLINE void backward_loop(const T* __restrict__ grad, const T* __restrict__ x,
                                T* __restrict__ dx, int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    const C v = load(x[i]);
    const Beyond<C> b = beyond(v, T{});
    const C below = b.tail - b.t_slope;
    const C slope = v < 0 ? below : C{1} - below;
    dx[i] = store<T>(load(grad[i]) * (std::isnan(v) ? v : slope));
  }
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(T)                                                            \
  NTKCL_MULTIVERSION void forward(const T* x, T* y, int64_t n) {                  \
    forward_loop<T>(x, y, n);                                                     \
  }                                                                               \
  NTKCL_MULTIVERSION void backward(const T* grad, const T* x, T* dx, int64_t n) { \
    backward_loop<T>(grad, x, dx, n);                                             \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
NTKCL_LOOPS(BFloat16)
#undef NTKCL_LOOPS

#ifdef NTKCL_X86_VERSIONS
// The same where the processor rounds to bfloat16 itself, without a division.
struct BeyondLanes {
  __m512 tail, t_tail, t_slope;
};

NTKCL_X86_BF16 NTKCL_INLINE BeyondLanes beyond(__m512 x) {
  using F = Fit<BFloat16>;
  const __m512 size = _mm512_abs_ps(x), end = _mm512_set1_ps(kEnd);
  const __m512 t = _mm512_maskz_min_ps(kAllLanes, size, end);  // of NaN: kEnd
  const __m512 e =
      power_near(_mm512_cmp_ps_mask(size, end, _CMP_LT_OQ), _mm512_set1_ps(-kHalfLog2E) * t * t);
  const __m512 denominator = t + _mm512_set1_ps(F::kCentre);
  const __m512 near = _mm512_maskz_rcp14_ps(kAllLanes, denominator);
  const __m512 inverse = near * _mm512_fnmadd_ps(denominator, near, _mm512_set1_ps(2.0F));
  const __m512 s = (t - _mm512_set1_ps(F::kCentre)) * inverse;
  __m512 p = _mm512_set1_ps(F::kP[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) {
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(F::kP[i]));
  }
  const __m512 tail = e * (p * inverse);
  return {tail, t * tail, e * (t * _mm512_set1_ps(static_cast<float>(kInverseSqrt2Pi)))};
}

// The first n of 32 numbers.
NTKCL_X86_BF16 NTKCL_INLINE __mmask32 lanes_before(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
}

NTKCL_X86_BF16 NTKCL_INLINE __m512 gelu_of(__m512 v) {
  return _mm512_maskz_max_ps(kAllLanes, _mm512_setzero_ps(), v) - beyond(v).t_tail;
}

NTKCL_X86_BF16 NTKCL_INLINE __m512 slope_of(__m512 v) {
  const BeyondLanes b = beyond(v);
  const __m512 below = b.tail - b.t_slope, above = _mm512_set1_ps(1.0F) - below;
  const __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_blend_ps(nan, _mm512_mask_blend_ps(negative, above, below), v);
}

NTKCL_X86_BF16 void forward_lanes(const BFloat16* x, BFloat16* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = lanes_before(n - i);
    const __m512i v = _mm512_maskz_loadu_epi16(some, x + i);
    const __m512i both = rounded_pair(gelu_of(firsts(v)), gelu_of(seconds(v)));
    _mm512_mask_storeu_epi16(y + i, some, as_pairs(both));
  }
}

NTKCL_X86_BF16 void backward_lanes(const BFloat16* grad, const BFloat16* x, BFloat16* dx,
                                   int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = lanes_before(n - i);
    const __m512i v = _mm512_maskz_loadu_epi16(some, x + i);
    const __m512i g = _mm512_maskz_loadu_epi16(some, grad + i);
    const __m512i both =
        rounded_pair(firsts(g) * slope_of(firsts(v)), seconds(g) * slope_of(seconds(v)));
    _mm512_mask_storeu_epi16(dx + i, some, as_pairs(both));
  }
}
#endif

}  // namespace

template <class T>
void gelu_cpu(const Gelu<T>& args, int64_t first, int64_t last) {
#ifdef NTKCL_X86_VERSIONS
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_x86_bf16()) {
      return forward_lanes(args.x + first, args.y + first, last - first);
    }
  }
#endif
  forward(args.x + first, args.y + first, last - first);
}

template <class T>
void gelu_backward_cpu(const GeluBackward<T>& args, int64_t first, int64_t last) {
#ifdef NTKCL_X86_VERSIONS
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_x86_bf16()) {
      return backward_lanes(args.grad + first, args.x + first, args.dx + first, last - first);
    }
  }
#endif
  backward(args.grad + first, args.x + first, args.dx + first, last - first);
}

#define NTKCL_INSTANTIATE(T)                                \
  template void gelu_cpu(const Gelu<T>&, int64_t, int64_t); \
  template void gelu_backward_cpu(const GeluBackward<T>&, int64_t, int64_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
