#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"

// Multi-head attention over packed tokens; see ops/attention.h.
namespace ntkcl::kernels {

// Packed tokens are (batch, tokens, 3 * heads * width): a token's q, k and v, each head by head.
struct AttentionSizes {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t prompts = 0;  // tokens 1 .. prompts, attended to apart; 0 without a gate
  int64_t width = 0;    // of a head

  int64_t columns() const { return heads * width; }

  // Where a token's row of head `matrix` of all images begins, among packed tokens of `parts`
  // projections.
  int64_t at(int64_t matrix, int64_t token, int64_t part, int64_t parts) const {
    return ((matrix / heads * tokens + token) * parts + part) * columns() + matrix % heads * width;
  }
};

template <class T>
struct Attention {
  AttentionSizes sizes;
  const T* qkv = nullptr;
  const T* gate = nullptr;  // (heads), or null
  T* out = nullptr;         // (batch, tokens, heads * width)
};

template <class T>
struct AttentionBackward {
  AttentionSizes sizes;
  const T* grad = nullptr;  // (batch, tokens, heads * width)
  const T* qkv = nullptr;
  const T* gate = nullptr;
  T* dqkv = nullptr;        // (batch, tokens, 3 * heads * width)
  double* dgate = nullptr;  // (batch * heads), null without a gate
};

}  // namespace ntkcl::kernels
