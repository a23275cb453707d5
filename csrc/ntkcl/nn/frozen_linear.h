#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "ntkcl/ops/float8_rows.h"

namespace ntkcl::nn {

// y = x W^T + b with a weight that is never trained: no gradient but that of x, and nothing kept
// for it.
//
// Note: packed, W and W^T lie in the layout that oneDNN's product of this processor wants, beside
// the weight itself, and the bias is added inside the product. The choice depends on the processor
// alone, never on a measurement, so that results do not change from run to run.
//
// Quantised, both factors of a product are 8-bit floating point numbers with a scale a row of x
// and of W, or of the gradient and of W^T, added up in float32 (ops/float8_rows.h). GPUs from sm_90
// on multiply such; elsewhere the same numbers are multiplied in float32.
struct FrozenLinear {
  at::Tensor weight{};  // (out, in)
  at::Tensor bias{};    // (out)
  // Undefined: torch's own product.
  at::Tensor packed{}, packed_transposed{};
  ops::Float8Rows float8{}, float8_transposed{};

  // (..., in) -> (..., out)
  at::Tensor operator()(const at::Tensor& x) const;
  // (..., out) -> (..., in): grad W, the gradient of x. Builds no graph of its own.
  at::Tensor input_gradient(const at::Tensor& grad) const;
  // gelu(y), exact, packed inside the product: for passes of which nothing is differentiated.
  at::Tensor gelu(const at::Tensor& x) const;

  // Outputs first .. first + count.
  FrozenLinear outputs(int64_t first, int64_t count) const;
  // On the CPU, in bfloat16 where the processor has it and in float32, but for wide matrices on
  // Intel's, which MKL multiplies as they are. `rows`: about how many rows of x there will be.
  FrozenLinear pack(int64_t rows) const;
  // ValueError for sides that are no multiples of 16.
  FrozenLinear quantise() const;

 private:
  bool uses_packed(const at::Tensor& x) const { return packed.defined() && x.numel() > 0; }
};

}  // namespace ntkcl::nn
