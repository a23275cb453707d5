#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ntkcl::ops {

// Section-wise cosine scores (NTK-CL section 4): the columns are S sections of equal width,
//
//   scores[i, k] = sum_s weights[s] * cos(x[i, s], prototypes[k, s])
//
//   x           (B, S*C) float32, float64 or bfloat16
//   prototypes  (n, S*C) of x's type
//   weights     (S) of x's type; with S = 1 it is the scale sigma of a cosine classifier
//   ->          (B, n)
//
// cos(a, b) = a . b / (max(|a|, 1e-12) max(|b|, 1e-12)), as of torch.nn.functional.normalize. All
// three may require a gradient. The cost is one matrix product (B, S*C) x (S*C, n) and another for
// each gradient of x or prototypes. With bfloat16, norms and sums are float32, and unit vectors are
// rounded to bfloat16, which costs less than the rounding of the result.
// Errors: ValueError (shapes, devices), TypeError (element types).
at::Tensor section_cosine(const at::Tensor& x, const at::Tensor& prototypes,
                          const at::Tensor& weights);

// grad (B, n) -> gradients of x (B, S*C) and of weights (S). As x and prototypes play the same
// role, the gradient of prototypes is the first result with grad.t() and the two exchanged.
std::tuple<at::Tensor, at::Tensor> section_cosine_backward(const at::Tensor& grad,
                                                           const at::Tensor& x,
                                                           const at::Tensor& prototypes,
                                                           const at::Tensor& weights);

namespace detail {

// What differs between devices; the tensors are contiguous and not empty. See
// kernels/section_cosine.h.
struct SectionKernels {
  // weights may be undefined: all 1. unit is of x's type, along of the type of the arithmetic.
  void (*normalize)(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& unit,
                    int64_t sections);
  void (*project)(const at::Tensor& pulled, const at::Tensor& x, const at::Tensor& weights,
                  const at::Tensor& dx, const at::Tensor& along);
};

at::Tensor section_cosine(const SectionKernels& kernels, const at::Tensor& x,
                          const at::Tensor& prototypes, const at::Tensor& weights);
std::tuple<at::Tensor, at::Tensor> section_cosine_backward(const SectionKernels& kernels,
                                                           const at::Tensor& grad,
                                                           const at::Tensor& x,
                                                           const at::Tensor& prototypes,
                                                           const at::Tensor& weights);
}  // namespace detail

}  // namespace ntkcl::ops
