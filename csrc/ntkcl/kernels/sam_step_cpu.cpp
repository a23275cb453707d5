#include "ntkcl/kernels/sam_step_cpu.h"

#include <algorithm>

#include "ntkcl/kernels/lanes.h"

// Sums are made in double and in an order of their own; momentum and sums are one sweep over memory
// by blocks that stay in the first-level cache.
namespace ntkcl::kernels {
namespace {

constexpr int64_t kBlock = 512;

template <class T>
NTKCL_INLINE double dot(const T* a, const T* b, int64_t n) {
  return sum_loop<double>(n, [=](int64_t i) NTKCL_INLINE_LAMBDA {
    return static_cast<double>(a[i]) * static_cast<double>(b[i]);
  });
}

template <class T>
NTKCL_INLINE void ascend_range(const SamTensor<T>& t, T scale, int64_t first, int64_t last) {
  T* __restrict__ parameter = t.parameter;
  T* __restrict__ saved = t.saved;
  const T* __restrict__ gradient = t.first_gradient;
  for (int64_t i = first; i < last; ++i) {
    saved[i] = parameter[i];
    parameter[i] = std::fma(gradient[i], scale, parameter[i]);
  }
}

template <class T>
NTKCL_INLINE Alignment momentum_range(const SamTensor<T>& t, T factor, int64_t first,
                                      int64_t last) {
  Alignment sums;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t n = std::min(kBlock, last - begin);
    T* __restrict__ momentum = t.momentum + begin;
    const T* __restrict__ saved = t.saved + begin;
    const T* __restrict__ gradient = t.gradient + begin;
    for (int64_t i = 0; i < n; ++i) {
      momentum[i] = moved_momentum(momentum[i], factor, saved[i], t.decay, gradient[i]);
    }
    if (t.first_gradient) {
      const T* g = t.first_gradient + begin;
      sums += {dot(momentum, g, n), dot(momentum, momentum, n), dot(g, g, n)};
    }
  }
  return sums;
}

template <class T>
NTKCL_INLINE void descend_range(const SamTensor<T>& t, T gamma, int64_t first, int64_t last) {
  T* __restrict__ parameter = t.parameter;
  const T* __restrict__ saved = t.saved;
  const T* __restrict__ momentum = t.momentum;
  const T factor = -t.lr * gamma;
  for (int64_t i = first; i < last; ++i) {
    parameter[i] = std::fma(factor, momentum[i], saved[i]);
  }
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(T)                                                                            \
  NTKCL_MULTIVERSION double square_sum(const T* x, int64_t first, int64_t last) {                 \
    return dot(x + first, x + first, last - first);                                               \
  }                                                                                               \
  NTKCL_MULTIVERSION void ascend(const SamTensor<T>& tensor, T scale, int64_t first,              \
                                 int64_t last) {                                                  \
    ascend_range(tensor, scale, first, last);                                                     \
  }                                                                                               \
  NTKCL_MULTIVERSION Alignment move_momentum(const SamTensor<T>& tensor, T factor, int64_t first, \
                                             int64_t last) {                                      \
    return momentum_range(tensor, factor, first, last);                                           \
  }                                                                                               \
  NTKCL_MULTIVERSION void descend(const SamTensor<T>& tensor, T gamma, int64_t first,             \
                                  int64_t last) {                                                 \
    descend_range(tensor, gamma, first, last);                                                    \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
#undef NTKCL_LOOPS

}  // namespace

template <class T>
double square_sum_cpu(const T* x, int64_t first, int64_t last) {
  return square_sum(x, first, last);
}

template <class T>
void sam_ascend_cpu(const SamTensor<T>& tensor, T scale, int64_t first, int64_t last) {
  ascend(tensor, scale, first, last);
}

template <class T>
Alignment sam_momentum_cpu(const SamTensor<T>& tensor, T factor, int64_t first, int64_t last) {
  return move_momentum(tensor, factor, first, last);
}

template <class T>
void sam_descend_cpu(const SamTensor<T>& tensor, T gamma, int64_t first, int64_t last) {
  descend(tensor, gamma, first, last);
}

#define NTKCL_INSTANTIATE(T)                                                     \
  template double square_sum_cpu(const T*, int64_t, int64_t);                    \
  template void sam_ascend_cpu(const SamTensor<T>&, T, int64_t, int64_t);        \
  template Alignment sam_momentum_cpu(const SamTensor<T>&, T, int64_t, int64_t); \
  template void sam_descend_cpu(const SamTensor<T>&, T, int64_t, int64_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
