#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"

// The steps of attention that are not matrix products; see ops/attention.h.
namespace ntkcl::kernels {

// Where the rows of head matrices stand among packed tokens. Heads are (batch, heads, rows, width),
// packed tokens (batch, tokens, stride) with a head's columns side by side. Row order: the class
// token, the patches, then the prompts, which among the tokens come right after the class token;
// so rows that are attended to together are neighbours.
struct HeadRows {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t prompts = 0;
  int64_t width = 0;
  int64_t stride = 0;  // elements between two tokens
  int64_t first = 0;   // the rows meant: [first, first + rows)
  int64_t rows = 0;
};

// heads = scale * packed
template <class T>
struct SplitHeads {
  HeadRows layout;
  const T* packed = nullptr;
  T* heads = nullptr;
  Compute<T> scale = 1;
};

// packed = scale * heads
template <class T>
struct MergeHeads {
  HeadRows layout;
  const T* heads = nullptr;
  T* packed = nullptr;
  Compute<T> scale = 1;
};

// x = softmax(x), row by row and in place. A NaN or a positive infinity makes its row NaN; a
// negative infinity has weight 0.
template <class T>
struct Softmax {
  T* x = nullptr;  // (rows, columns)
  int64_t columns = 0;
};

// grad = y * (grad - sum(y * grad)), row by row and in place: the gradient through y = softmax(x).
template <class T>
struct SoftmaxBackward {
  const T* y = nullptr;  // (rows, columns)
  T* grad = nullptr;     // (rows, columns)
  int64_t columns = 0;
};

}  // namespace ntkcl::kernels
