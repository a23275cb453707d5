#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::optim {

// Scales the gradients of `parameters` in place by min(1, max_norm / (norm + 1e-6)), norm the
// Euclidean norm over all of them together; undefined gradients count as zero. Returns the norm
// before clipping, a scalar on the parameters' device: the host does not wait for it. Arithmetic
// of torch.nn.utils.clip_grad_norm_. ValueError unless max_norm > 0 and there is a parameter.
at::Tensor clip_grad_norm_(at::TensorList parameters, double max_norm);

}  // namespace ntkcl::optim
