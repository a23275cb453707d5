#pragma once

#include <cstddef>

#include "ntkcl/kernels/attention.h"

// For T in float, double, BFloat16; [first, last) are heads of images, batch * heads of them. The
// caller splits the work over threads; the result does not depend on how.
namespace ntkcl::kernels {

// Bytes of memory that a thread needs beside the arguments, aligned to 64.
template <class T>
int64_t attention_scratch(const AttentionSizes& sizes);
template <class T>
int64_t attention_backward_scratch(const AttentionSizes& sizes);

template <class T>
void attention_cpu(const Attention<T>& args, int64_t first, int64_t last, std::byte* scratch);

template <class T>
void attention_backward_cpu(const AttentionBackward<T>& args, int64_t first, int64_t last,
                            std::byte* scratch);

}  // namespace ntkcl::kernels
