#pragma once

#include "ntkcl/kernels/sam_step.h"

// For T in float, double; elements [first, last) of one tensor. The caller splits the work over
// threads.
namespace ntkcl::kernels {

template <class T>
double square_sum_cpu(const T* x, int64_t first, int64_t last);

// saved = parameter; parameter = parameter + scale * first_gradient.
template <class T>
void sam_ascend_cpu(const SamTensor<T>& tensor, T scale, int64_t first, int64_t last);

// momentum = factor * momentum + gradient + decay * saved. Returns how it is aligned to the first
// gradient, which may be null: zeros then.
template <class T>
Alignment sam_momentum_cpu(const SamTensor<T>& tensor, T factor, int64_t first, int64_t last);

// parameter = saved - lr * gamma * momentum.
template <class T>
void sam_descend_cpu(const SamTensor<T>& tensor, T gamma, int64_t first, int64_t last);

}  // namespace ntkcl::kernels
