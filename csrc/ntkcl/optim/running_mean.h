#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace ntkcl::optim {

// previous <- n/(n+1) previous + 1/(n+1) current, tensor by tensor: the mean over n + 1 tasks once
// `previous` is the mean over n (NTK-CL's adaptive EMA). n = 0 copies. No gradients are recorded.
// ValueError for n < 0 or lists that do not match.
void running_mean_(at::TensorList previous, at::TensorList current, int64_t n);

}  // namespace ntkcl::optim
