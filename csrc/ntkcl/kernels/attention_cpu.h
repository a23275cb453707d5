#pragma once

#include "ntkcl/kernels/attention.h"

// For T in float, double, BFloat16; [first, last) are batch * heads matrices for the heads, rows
// for the softmax. The caller splits the work over threads; the result does not depend on how.
namespace ntkcl::kernels {

template <class T>
void split_heads_cpu(const SplitHeads<T>& args, int64_t first, int64_t last);

template <class T>
void merge_heads_cpu(const MergeHeads<T>& args, int64_t first, int64_t last);

template <class T>
void softmax_cpu(const Softmax<T>& args, int64_t first, int64_t last);

template <class T>
void softmax_backward_cpu(const SoftmaxBackward<T>& args, int64_t first, int64_t last);

}  // namespace ntkcl::kernels
