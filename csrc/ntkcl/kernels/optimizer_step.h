#pragma once

#include <cmath>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/multiversion.h"

// A step of SGD or Adam, with a pull to an anchor before it and a running average after it, element
// by element; see ops/optimizer_step.h. T is float or double. Products are added by fused
// multiply-adds, written out: the same arithmetic on every processor and device.
namespace ntkcl::kernels {

// One tensor of the sweep; null where there is none.
template <class T>
struct StepTensor {
  T* parameter = nullptr;
  const T* gradient = nullptr;
  T* first = nullptr;   // SGD's momentum, Adam's running mean of gradients
  T* second = nullptr;  // Adam's running mean of squared gradients
  const T* anchor = nullptr;
  T* average = nullptr;
  int64_t size = 0;
};

struct StepOptions {
  double lr = 0;
  double weight_decay = 0;
  double anchor_weight = 0;
  double average_decay = 0;
};
struct SgdOptions {
  StepOptions step;
  double momentum = 0;
};
struct AdamOptions {
  StepOptions step;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  bool decoupled = false;  // AdamW's weight decay
};

// The same in the type of the arithmetic, each number rounded once.
template <class T>
struct StepRegularizer {
  T pull;   // 2 anchor_weight
  T decay;  // added to the gradient
  T average_decay;
};

template <class T>
struct SgdStep {
  explicit SgdStep(const SgdOptions& o)
      : regularizer{static_cast<T>(2 * o.step.anchor_weight), static_cast<T>(o.step.weight_decay),
                    static_cast<T>(o.step.average_decay)},
        lr(static_cast<T>(o.step.lr)),
        momentum(static_cast<T>(o.momentum)) {}

  StepRegularizer<T> regularizer;
  T lr, momentum;
};

template <class T>
struct AdamStep {
  // steps: how many there have been with this one.
  NTKCL_HOST_DEVICE AdamStep(const AdamOptions& o, double steps)
      : regularizer{static_cast<T>(2 * o.step.anchor_weight),
                    static_cast<T>(o.decoupled ? 0 : o.step.weight_decay),
                    static_cast<T>(o.step.average_decay)},
        shrink(static_cast<T>(o.decoupled ? 1 - o.step.lr * o.step.weight_decay : 1)),
        lr(static_cast<T>(o.step.lr / (1 - std::pow(o.beta1, steps)))),
        beta2(static_cast<T>(o.beta2)),
        mean_weight(static_cast<T>(1 - o.beta1)),
        square_weight(static_cast<T>(1 - o.beta2)),
        correction(static_cast<T>(std::sqrt(1 - std::pow(o.beta2, steps)))),
        eps(static_cast<T>(o.eps)) {}

  StepRegularizer<T> regularizer;
  T shrink;  // of the parameter, by decoupled decay
  T lr;      // over the bias correction of the mean
  T beta2, mean_weight, square_weight;
  T correction;  // root of the bias correction of the square
  T eps;
};

template <class T>
NTKCL_HOST_DEVICE NTKCL_INLINE T regularized(const StepRegularizer<T>& r, T gradient, T parameter,
                                             T moved) {
  // Without a pull or a decay, parameters may be infinite.
  const T pulled = r.pull == T{0} ? gradient : std::fma(moved, r.pull, gradient);
  return r.decay == T{0} ? pulled : std::fma(parameter, r.decay, pulled);
}

template <class T>
NTKCL_HOST_DEVICE NTKCL_INLINE T averaged(const StepRegularizer<T>& r, T average, T parameter) {
  return std::fma(average, r.average_decay, (T{1} - r.average_decay) * parameter);
}

// The mean of gradients moves by the shorter way, so that it stays where it is at weight 0 and is
// the gradient at 1.
template <class T>
NTKCL_HOST_DEVICE NTKCL_INLINE T moved_mean(const AdamStep<T>& s, T mean, T gradient) {
  const bool near = s.mean_weight < T{0.5};
  return std::fma(near ? s.mean_weight : s.mean_weight - T{1}, gradient - mean,
                  near ? mean : gradient);
}

template <class T>
NTKCL_HOST_DEVICE NTKCL_INLINE T moved_square(const AdamStep<T>& s, T square, T gradient) {
  return std::fma(square, s.beta2, s.square_weight * gradient * gradient);
}

template <class T>
NTKCL_HOST_DEVICE NTKCL_INLINE T adam_parameter(const AdamStep<T>& s, T parameter, T mean,
                                                T square) {
  return parameter - s.lr * mean / (std::sqrt(square) / s.correction + s.eps);
}

}  // namespace ntkcl::kernels
