#include "ntkcl/nn/residual.h"

#include <ATen/ATen.h>

#include "ntkcl/ops/residual_layer_norm.h"

namespace ntkcl::nn {

at::Tensor Residual::value() const {
  return update.defined() ? stream + update : stream;
}

Normalised layer_norm(const Residual& x, const at::Tensor& weight, const at::Tensor& bias,
                      at::ScalarType type) {
  const bool updated = x.update.defined();
  const ops::ResidualLayerNorm found =
      ops::residual_layer_norm(x.stream, updated ? std::optional(x.update) : std::nullopt, weight,
                               bias, kLayerNormEps, type);
  return {updated ? found.sum : x.stream, found.out, found.mean, found.scale};
}

}  // namespace ntkcl::nn
