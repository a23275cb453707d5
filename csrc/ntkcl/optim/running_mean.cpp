#include "ntkcl/optim/running_mean.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "ntkcl/core/error.h"

namespace ntkcl::optim {

void running_mean_(at::TensorList previous, at::TensorList current, int64_t n) {
  constexpr const char* kWhere = "running_mean_";
  NTKCL_CHECK(n >= 0, kWhere, "expected n >= 0, got ", n);
  NTKCL_CHECK(previous.size() == current.size(), kWhere, "expected ", previous.size(),
              " current tensors, got ", current.size());
  for (size_t i = 0; i < previous.size(); ++i) {
    NTKCL_CHECK(previous[i].sizes() == current[i].sizes(), kWhere, "tensor ", i, ": expected ",
                previous[i].sizes(), ", got ", current[i].sizes());
  }
  if (previous.empty()) {
    return;
  }
  const c10::NoGradGuard no_grad;
  if (n == 0) {
    at::_foreach_copy_(previous, current);
    return;
  }
  const auto count = static_cast<double>(n);
  at::_foreach_mul_(previous, count / (count + 1));
  at::_foreach_add_(previous, current, 1 / (count + 1));
}

}  // namespace ntkcl::optim
