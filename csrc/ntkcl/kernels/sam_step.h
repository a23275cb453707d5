#pragma once

#include <cmath>

#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/multiversion.h"

// The sweeps of SAM and SAM+ over one tensor of the parameters; see ops/sam_step.h. T is float or
// double. Products are added by fused multiply-adds, written out: the same arithmetic on every
// processor and device.
namespace ntkcl::kernels {

template <class T>
struct SamTensor {
  T* parameter = nullptr;
  T* saved = nullptr;  // the parameter before the step up the slope
  T* momentum = nullptr;
  const T* first_gradient = nullptr;  // there
  const T* gradient = nullptr;        // up the slope
  int64_t size = 0;
  int64_t rows = 1;       // tensors that it stacks, each of which has its own alignment
  int64_t first_row = 0;  // among the rows of all tensors
  T lr = 0, decay = 0;
};

// What cos(v, g) of a row is made of, g the first gradient.
struct Alignment {
  double product = 0;          // <v, g>
  double momentum_square = 0;  // |v|^2
  double gradient_square = 0;  // |g|^2

  NTKCL_HOST_DEVICE NTKCL_INLINE void operator+=(const Alignment& other) {
    product += other.product;
    momentum_square += other.momentum_square;
    gradient_square += other.gradient_square;
  }
};

template <class T>
NTKCL_HOST_DEVICE NTKCL_INLINE T moved_momentum(T momentum, T factor, T saved, T decay,
                                                T gradient) {
  // Without a decay, parameters may be infinite.
  return std::fma(momentum, factor, decay == T{0} ? gradient : std::fma(saved, decay, gradient));
}

}  // namespace ntkcl::kernels
