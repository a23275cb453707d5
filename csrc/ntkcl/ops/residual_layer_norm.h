#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ntkcl::ops {

// What a residual stream meets between two parts of a transformer's block, in one pass over memory:
//
//   sum = x + update,   out = LayerNorm(sum) weight + bias
//
//   x        (..., C) float32, float64 or bfloat16: the stream
//   update   (..., C) of x's type, or bfloat16 beside float32; none: x itself is the sum
//   weight   (C) of x's type
//   bias     (C) of x's type
//   eps      added to the variance
//   dtype    of out: x's type, or bfloat16 beside float32; none: x's type
//
// Mean and variance are of the sum as it is stored, in float32 (float64 for float64), biased as in
// torch.nn.functional.layer_norm.
// Errors: ValueError (shapes, devices, eps), TypeError (element types).
struct ResidualLayerNorm {
  at::Tensor sum;    // (..., C) of x's type; without an update (0): x itself is the sum
  at::Tensor out;    // (..., C)
  at::Tensor mean;   // (...) float32, or float64 for float64; no gradient
  at::Tensor scale;  // (...) 1 / sqrt(variance + eps), likewise
};
ResidualLayerNorm residual_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& update,
                                      const at::Tensor& weight, const at::Tensor& bias, double eps,
                                      std::optional<at::ScalarType> dtype = std::nullopt);

// From the gradients of out and of sum (none: 0), with what the forward pass gave (`sum` is x where
// there was no update). dx is the gradient of x and, in its own type, of the update.
struct ResidualLayerNormGradients {
  at::Tensor dx;
  at::Tensor dupdate;         // dx in update_dtype, (0) where that is none or x's type
  at::Tensor dweight, dbias;  // (C), or (0) without `affine`

  const at::Tensor& of_update() const { return dupdate.sizes() == dx.sizes() ? dupdate : dx; }
};
ResidualLayerNormGradients residual_layer_norm_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& sum_grad, const at::Tensor& sum,
    const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight,
    std::optional<at::ScalarType> update_dtype, bool affine);

namespace detail {

// What differs between devices; see residual_layer_norm_arguments.h.
struct ResidualLayerNormKernels {
  void (*forward)(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                  const at::Tensor& bias, double eps, const ResidualLayerNorm& results);
  void (*backward)(const at::Tensor& grad, const at::Tensor& sum_grad, const at::Tensor& sum,
                   const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight,
                   const at::Tensor& dx, const at::Tensor& dupdate);
};

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FourTensors residual_layer_norm(const ResidualLayerNormKernels& kernels, const at::Tensor& x,
                                const std::optional<at::Tensor>& update, const at::Tensor& weight,
                                const at::Tensor& bias, double eps,
                                std::optional<at::ScalarType> dtype);
FourTensors residual_layer_norm_backward(const ResidualLayerNormKernels& kernels,
                                         const at::Tensor& grad,
                                         const std::optional<at::Tensor>& sum_grad,
                                         const at::Tensor& sum, const at::Tensor& mean,
                                         const at::Tensor& scale, const at::Tensor& weight,
                                         std::optional<at::ScalarType> update_dtype, bool affine);

}  // namespace detail

}  // namespace ntkcl::ops
