#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"

// sum = x + update, out = LayerNorm(sum) * weight + bias, over rows of `width` elements, and the
// backward pass; see ops/residual_layer_norm.h. S is the type of the stream, U that of the update,
// O that of the result.
namespace ntkcl::kernels {

template <class S, class U, class O>
struct ResidualLayerNorm {
  const S* x = nullptr;         // (rows, width)
  const U* update = nullptr;    // (rows, width); null: none, x itself is the sum
  const S* weight = nullptr;    // (width)
  const S* bias = nullptr;      // (width)
  S* sum = nullptr;             // (rows, width); null without an update
  O* out = nullptr;             // (rows, width)
  Compute<S>* mean = nullptr;   // (rows)
  Compute<S>* scale = nullptr;  // (rows) 1 / sqrt(variance + eps)
  int64_t rows = 0;
  int64_t width = 0;
  double eps = 0;
};

template <class S, class U, class O>
struct ResidualLayerNormBackward {
  const O* grad = nullptr;            // (rows, width) of out
  const S* sum_grad = nullptr;        // (rows, width) of sum; null: 0
  const S* sum = nullptr;             // (rows, width)
  const Compute<S>* mean = nullptr;   // (rows)
  const Compute<S>* scale = nullptr;  // (rows)
  const S* weight = nullptr;          // (width)
  S* dx = nullptr;                    // (rows, width)
  U* dupdate = nullptr;               // (rows, width) the same in U; null: not wanted
  int64_t rows = 0;
  int64_t width = 0;
};

}  // namespace ntkcl::kernels

// Calls macro(S, U, O) for each combination that there is: all alike, or bfloat16 beside float.
#define NTKCL_FOR_LAYER_NORM_TYPES(macro)                                                       \
  macro(float, float, float) macro(float, float, BFloat16) macro(float, BFloat16, float) macro( \
      float, BFloat16, BFloat16) macro(double, double, double) macro(BFloat16, BFloat16, BFloat16)
