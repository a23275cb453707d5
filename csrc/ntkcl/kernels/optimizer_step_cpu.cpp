#include "ntkcl/kernels/optimizer_step_cpu.h"

#include <algorithm>

#include "ntkcl/kernels/lanes.h"

// One sweep over memory, by blocks whose gradient is worked out in the first-level cache: what is
// absent then costs a branch a block and not one an element.
namespace ntkcl::kernels {
namespace {

constexpr int64_t kBlock = 512;

// The gradient of a block with pull and decay; returns the block's distance to the anchor.
template <class T>
NTKCL_INLINE double regularize_block(const StepRegularizer<T>& r, const StepTensor<T>& tensor,
                                     int64_t begin, int64_t n, T* __restrict__ gradient) {
  const T* parameter = tensor.parameter + begin;
  const T* given = tensor.gradient + begin;
  if (!tensor.anchor) {
    for (int64_t i = 0; i < n; ++i) {
      gradient[i] = regularized(r, given[i], parameter[i], T{0});
    }
    return 0;
  }
  const T* anchor = tensor.anchor + begin;
  for (int64_t i = 0; i < n; ++i) {
    gradient[i] = regularized(r, given[i], parameter[i], parameter[i] - anchor[i]);
  }
  return sum_loop<double>(n, [=](int64_t i) NTKCL_INLINE_LAMBDA {
    const double moved = parameter[i] - anchor[i];
    return moved * moved;
  });
}

template <class T>
NTKCL_INLINE void average_block(const StepRegularizer<T>& r, const StepTensor<T>& tensor,
                                int64_t begin, int64_t n) {
  if (!tensor.average) {
    return;
  }
  const T* __restrict__ parameter = tensor.parameter + begin;
  T* __restrict__ average = tensor.average + begin;
  for (int64_t i = 0; i < n; ++i) {
    average[i] = averaged(r, average[i], parameter[i]);
  }
}

// Calls move(begin, n, gradient) for every block.
template <class T, class Move>
NTKCL_INLINE double over_blocks(const StepRegularizer<T>& r, const StepTensor<T>& tensor,
                                int64_t first, int64_t last, const Move& move) {
  T gradient[kBlock];
  double distance = 0;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t n = std::min(kBlock, last - begin);
    distance += regularize_block(r, tensor, begin, n, gradient);
    move(begin, n, gradient);
    average_block(r, tensor, begin, n);
  }
  return distance;
}

template <class T>
NTKCL_INLINE double sgd_range(const StepTensor<T>& tensor, const SgdStep<T>& s, int64_t first,
                              int64_t last) {
  return over_blocks(s.regularizer, tensor, first, last,
                     [&](int64_t begin, int64_t n, T* __restrict__ gradient) NTKCL_INLINE_LAMBDA {
                       T* __restrict__ parameter = tensor.parameter + begin;
                       if (tensor.first) {
                         T* __restrict__ momentum = tensor.first + begin;
                         for (int64_t i = 0; i < n; ++i) {
                           gradient[i] = std::fma(momentum[i], s.momentum, gradient[i]);
                           momentum[i] = gradient[i];
                         }
                       }
                       for (int64_t i = 0; i < n; ++i) {
                         parameter[i] = std::fma(-s.lr, gradient[i], parameter[i]);
                       }
                     });
}

template <class T>
NTKCL_INLINE double adam_range(const StepTensor<T>& tensor, const AdamStep<T>& s, int64_t first,
                               int64_t last) {
  return over_blocks(s.regularizer, tensor, first, last,
                     [&](int64_t begin, int64_t n, T* __restrict__ gradient) NTKCL_INLINE_LAMBDA {
                       T* __restrict__ parameter = tensor.parameter + begin;
                       T* __restrict__ mean = tensor.first + begin;
                       T* __restrict__ square = tensor.second + begin;
                       for (int64_t i = 0; i < n; ++i) {
                         mean[i] = moved_mean(s, mean[i], gradient[i]);
                         square[i] = moved_square(s, square[i], gradient[i]);
                         parameter[i] =
                             adam_parameter(s, s.shrink * parameter[i], mean[i], square[i]);
                       }
                     });
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(T)                                                                       \
  NTKCL_MULTIVERSION double step_range(const StepTensor<T>& tensor, const SgdStep<T>& step,  \
                                       int64_t first, int64_t last) {                        \
    return sgd_range(tensor, step, first, last);                                             \
  }                                                                                          \
  NTKCL_MULTIVERSION double step_range(const StepTensor<T>& tensor, const AdamStep<T>& step, \
                                       int64_t first, int64_t last) {                        \
    return adam_range(tensor, step, first, last);                                            \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
#undef NTKCL_LOOPS

}  // namespace

template <class T, class Step>
double optimizer_step_cpu(const StepTensor<T>& tensor, const Step& step, int64_t first,
                          int64_t last) {
  return step_range(tensor, step, first, last);
}

#define NTKCL_INSTANTIATE(T)                                                                     \
  template double optimizer_step_cpu(const StepTensor<T>&, const SgdStep<T>&, int64_t, int64_t); \
  template double optimizer_step_cpu(const StepTensor<T>&, const AdamStep<T>&, int64_t, int64_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
