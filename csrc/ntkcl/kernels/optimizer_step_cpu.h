#pragma once

#include "ntkcl/kernels/optimizer_step.h"

// For T in float, double and Step in SgdStep<T>, AdamStep<T>; elements [first, last) of one tensor.
// The caller splits the work over threads.
namespace ntkcl::kernels {

// Returns the sum of (parameter - anchor)^2 before the step; 0 without an anchor.
template <class T, class Step>
double optimizer_step_cpu(const StepTensor<T>& tensor, const Step& step, int64_t first,
                          int64_t last);

}  // namespace ntkcl::kernels
