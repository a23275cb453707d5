#include "ntkcl/kernels/attention_cpu.h"

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "ntkcl/kernels/lanes.h"

namespace ntkcl::kernels {
namespace {

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial in x - n log 2. Exactly 0
// below -87, where float32 ends. NaN stays NaN.
NTKCL_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float y = x < -87.0F ? -87.0F : x;
  const float shifted = y * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375F) + n * 2.12194440e-4F;  // log 2 in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000U;
  const float value = p * std::bit_cast<float>(power);
  return x < -87.0F ? 0.0F : value;
}

NTKCL_INLINE double exp_of(double x) {
  return std::exp(x);
}

template <class T>
NTKCL_INLINE Compute<T> max_loop(const T* x, int64_t n) {
  using C = Compute<T>;
  C lanes[kLanes];
  for (C& lane : lanes) {
    lane = -std::numeric_limits<C>::infinity();
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const C value = load(x[i + lane]);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    const C value = load(x[i + lane]);
    lanes[lane] = value > lanes[lane] ? value : lanes[lane];
  }
  C largest = lanes[0];
  for (const C lane : lanes) {
    largest = lane > largest ? lane : largest;
  }
  return largest;
}

// Through `exps`, n numbers: rounding to the element type comes last.
template <class T>
NTKCL_INLINE void softmax_loop(T* x, int64_t n, Compute<T>* __restrict__ exps) {
  using C = Compute<T>;
  const C largest = max_loop(x, n);
  for (int64_t i = 0; i < n; ++i) {
    exps[i] = exp_of(load(x[i]) - largest);
  }
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += exps[i + lane];
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    lanes[lane] += exps[i + lane];
  }
  const C factor = C{1} / sum_of(lanes);
  for (int64_t j = 0; j < n; ++j) {
    x[j] = store<T>(exps[j] * factor);
  }
}

template <class T>
NTKCL_INLINE void softmax_backward_loop(const T* __restrict__ y, T* __restrict__ grad, int64_t n) {
  const Compute<T> along = dot_loop<T>(y, grad, n);
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = store<T>(load(y[i]) * (load(grad[i]) - along));
  }
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(T)                                                                  \
  NTKCL_MULTIVERSION void softmax_row(T* x, int64_t n, Compute<T>* exps) {              \
    softmax_loop<T>(x, n, exps);                                                        \
  }                                                                                     \
  NTKCL_MULTIVERSION void softmax_backward_row(const T* y, T* grad, int64_t n) {        \
    softmax_backward_loop<T>(y, grad, n);                                               \
  }                                                                                     \
  NTKCL_MULTIVERSION void scale_row(const T* x, Compute<T> factor, T* out, int64_t n) { \
    scale_loop<T>(x, factor, out, n);                                                   \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
NTKCL_LOOPS(BFloat16)
#undef NTKCL_LOOPS

// The token of a row: see HeadRows.
int64_t token_of(const HeadRows& layout, int64_t row) {
  const int64_t others = layout.tokens - layout.prompts;
  return row == 0 ? 0 : row < others ? row + layout.prompts : row - others + 1;
}

// Calls copy(offset in the packed tokens, offset in the heads) for each row of [first, last).
template <class Copy>
void for_each_row(const HeadRows& layout, int64_t first, int64_t last, Copy&& copy) {
  for (int64_t matrix = first; matrix < last; ++matrix) {
    const int64_t image = matrix / layout.heads, head = matrix % layout.heads;
    for (int64_t row = 0; row < layout.rows; ++row) {
      const int64_t token = token_of(layout, layout.first + row);
      copy((image * layout.tokens + token) * layout.stride + head * layout.width,
           (matrix * layout.rows + row) * layout.width);
    }
  }
}

}  // namespace

template <class T>
void split_heads_cpu(const SplitHeads<T>& args, int64_t first, int64_t last) {
  for_each_row(args.layout, first, last, [&](int64_t packed, int64_t heads) {
    scale_row(args.packed + packed, args.scale, args.heads + heads, args.layout.width);
  });
}

template <class T>
void merge_heads_cpu(const MergeHeads<T>& args, int64_t first, int64_t last) {
  for_each_row(args.layout, first, last, [&](int64_t packed, int64_t heads) {
    scale_row(args.heads + heads, args.scale, args.packed + packed, args.layout.width);
  });
}

template <class T>
void softmax_cpu(const Softmax<T>& args, int64_t first, int64_t last) {
  std::vector<Compute<T>> exps(static_cast<size_t>(args.columns));
  for (int64_t row = first; row < last; ++row) {
    softmax_row(args.x + row * args.columns, args.columns, exps.data());
  }
}

template <class T>
void softmax_backward_cpu(const SoftmaxBackward<T>& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    softmax_backward_row(args.y + row * args.columns, args.grad + row * args.columns, args.columns);
  }
}

#define NTKCL_INSTANTIATE(T)                                             \
  template void split_heads_cpu(const SplitHeads<T>&, int64_t, int64_t); \
  template void merge_heads_cpu(const MergeHeads<T>&, int64_t, int64_t); \
  template void softmax_cpu(const Softmax<T>&, int64_t, int64_t);        \
  template void softmax_backward_cpu(const SoftmaxBackward<T>&, int64_t, int64_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
