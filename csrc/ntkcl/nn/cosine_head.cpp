#include "ntkcl/nn/cosine_head.h"

#include <ATen/ATen.h>

#include "ntkcl/ops/unit_rows.h"

namespace ntkcl::nn {

at::Tensor unit_rows(const at::Tensor& x) {
  return ops::unit_rows(x).unit;
}

at::Tensor cosines(const at::Tensor& x, const at::Tensor& weight) {
  return at::linear(unit_rows(x), unit_rows(weight));
}

at::Tensor cosine_logits(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& sigma) {
  return sigma * cosines(x, weight);
}

}  // namespace ntkcl::nn
