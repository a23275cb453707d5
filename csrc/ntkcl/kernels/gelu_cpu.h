#pragma once

#include "ntkcl/kernels/gelu.h"

// For T in float, double, BFloat16; elements [first, last). The caller splits the work over
// threads, at multiples of 64, so that the result does not depend on how.
namespace ntkcl::kernels {

template <class T>
void gelu_cpu(const Gelu<T>& args, int64_t first, int64_t last);

template <class T>
void gelu_backward_cpu(const GeluBackward<T>& args, int64_t first, int64_t last);

}  // namespace ntkcl::kernels
