#include "ntkcl/optim/gradient_clipping.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "ntkcl/core/error.h"

namespace ntkcl::optim {

at::Tensor clip_grad_norm_(at::TensorList parameters, double max_norm) {
  constexpr const char* kWhere = "clip_grad_norm_";
  NTKCL_CHECK(max_norm > 0, kWhere, "expected max_norm > 0, got ", max_norm);
  NTKCL_CHECK(!parameters.empty(), kWhere, "expected at least one parameter, got none");
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) {
      gradients.push_back(parameter.grad());
    }
  }
  if (gradients.empty()) {
    return at::zeros({}, parameters[0].options().requires_grad(false));
  }
  const at::Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(gradients, 2)), 2);
  // Multiplying by 1 costs less than asking the device whether to.
  at::_foreach_mul_(gradients, at::clamp_max(max_norm / (norm + 1e-6), 1.0));
  return norm;
}

}  // namespace ntkcl::optim
