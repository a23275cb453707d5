#include "ntkcl/methods/ntk_cl/losses.h"

#include <ATen/ATen.h>

#include <limits>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/cosine_head.h"

namespace ntkcl::methods::ntk_cl {
namespace {

constexpr double kRankTolerance = 1e-4;
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

at::Tensor release_value(const at::Tensor& similarity, const at::Tensor& positive,
                         const at::Tensor& off_diagonal) {
  // One log over all ordered positive pairs. Without a pair the sum runs over zeros, whose value
  // is dropped below and whose gradient is 0: no branch waits for the device.
  const at::Tensor any = positive.any();
  const at::Tensor kept = at::where(positive, similarity, kMinusInfinity);
  const at::Tensor pairs = at::where(any, kept, at::zeros_like(kept));
  const at::Tensor value =
      at::logsumexp(pairs.flatten(), {0}) -
      at::logsumexp(at::where(off_diagonal, similarity, kMinusInfinity), {1}).mean();
  return at::where(any, value, at::zeros_like(value));
}

at::Tensor infonce_value(const at::Tensor& similarity, const at::Tensor& positive,
                         const at::Tensor& off_diagonal, int64_t anchors) {
  const at::Tensor s = similarity.narrow(0, 0, anchors);
  const at::Tensor p = positive.narrow(0, 0, anchors).to(s.scalar_type());
  const at::Tensor all =
      at::logsumexp(at::where(off_diagonal.narrow(0, 0, anchors), s, kMinusInfinity), {1});
  const at::Tensor count = p.sum(1);
  const at::Tensor has = count.gt(0).to(s.scalar_type());
  const at::Tensor per_anchor = (all - (s * p).sum(1) / count.clamp_min(1)) * has;
  return per_anchor.sum() / has.sum().clamp_min(1);
}

}  // namespace

at::Tensor dissimilarity(const std::string& kind, const at::Tensor& fused, const at::Tensor& labels,
                         const at::Tensor& old, const at::Tensor& old_labels, double temperature) {
  const at::Tensor z = nn::unit_rows(at::cat({fused, old}));
  const at::Tensor y = at::cat({labels, old_labels});
  if (z.size(0) < 2) {
    return (fused * 0).sum();  // a batch of one
  }
  const at::Tensor similarity = at::matmul(z, z.t()) / temperature;
  const at::Tensor off_diagonal = at::eye(z.size(0), z.options()).eq(0);
  const at::Tensor positive = y.unsqueeze(0).eq(y.unsqueeze(1)).logical_and(off_diagonal);
  if (kind == "release") {
    return release_value(similarity, positive, off_diagonal);
  }
  NTKCL_ASSERT(kind == "infonce");
  return infonce_value(similarity, positive, off_diagonal, fused.size(0));
}

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

at::Tensor signed_sum(const at::Tensor& features, const at::Tensor& direction) {
  return at::matmul(nn::unit_rows(features), direction).sum();
}

at::Tensor projection_energy(const at::Tensor& section, const at::Tensor& basis) {
  return at::matmul(nn::unit_rows(section), basis).square().sum(1).mean();
}

}  // namespace ntkcl::methods::ntk_cl
