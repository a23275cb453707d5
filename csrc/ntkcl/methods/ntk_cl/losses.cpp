#include "ntkcl/methods/ntk_cl/losses.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ntkcl/nn/cosine_head.h"

namespace ntkcl::methods::ntk_cl {
namespace {

constexpr double kRankTolerance = 1e-4;

}  // namespace

at::Tensor old_basis(const at::Tensor& prototypes, int64_t limit) {
  const at::Tensor rows = nn::unit_rows(prototypes.detach().to(at::kDouble));
  if (rows.size(0) == 0) {
    return at::zeros({rows.size(1), 0}, prototypes.options());
  }
  // Right singular vectors of the rows = left ones of their transpose; thin, once per task.
  const auto [u, s, vh] = at::linalg_svd(rows, /*full_matrices=*/false);
  const int64_t rank = s.gt(kRankTolerance).sum().item<int64_t>();
  return vh.narrow(0, 0, std::min(limit, rank)).t().to(prototypes.scalar_type()).contiguous();
}

at::Tensor signed_direction(const at::Tensor& basis) {
  return 1.0 - at::matmul(basis, basis.sum(0));
}

}  // namespace ntkcl::methods::ntk_cl
