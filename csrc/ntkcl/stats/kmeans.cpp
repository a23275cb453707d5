#include "ntkcl/stats/kmeans.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ntkcl/core/error.h"

namespace ntkcl::stats {
namespace {

// |x_i - c_j|^2 without the cancellation of |x|^2 - 2 x c + |c|^2: clusters are few.
at::Tensor squared_distances(const at::Tensor& x, const at::Tensor& centers) {
  return (x.unsqueeze(1) - centers.unsqueeze(0)).square().sum(2);
}

// Gives each empty cluster the row that is farthest from its center, of a cluster with others.
void fill_empty(const at::Tensor& distances, at::Tensor& labels, int64_t k) {
  at::Tensor own = distances.gather(1, labels.unsqueeze(1)).squeeze(1);
  for (int64_t cluster = 0; cluster < k; ++cluster) {
    const at::Tensor counts = at::bincount(labels, {}, k);
    if (counts[cluster].item<int64_t>() > 0) {
      continue;
    }
    const at::Tensor alone = counts.index_select(0, labels).le(1);
    const int64_t row = own.masked_fill(alone, -1).argmax().item<int64_t>();
    labels[row] = cluster;
    own[row] = 0;
  }
}

}  // namespace

at::Tensor cluster_means(const at::Tensor& x, const at::Tensor& labels, int64_t k) {
  const at::Tensor counts = at::bincount(labels, {}, k).clamp_min(1).unsqueeze(1);
  const at::Tensor sums = at::zeros({k, x.size(1)}, x.options()).index_add_(0, labels, x);
  return sums / counts.to(x.scalar_type());
}

at::Tensor kmeans_plus_plus(const at::Tensor& x, const at::Tensor& draws) {
  NTKCL_CHECK(x.dim() == 2 && x.size(0) > 0, "kmeans", "expected rows (n, C), n >= 1, got ",
              x.sizes());
  const int64_t n = x.size(0), k = draws.size(0);
  NTKCL_CHECK(k >= 1, "kmeans", "expected at least 1 cluster, got ", k);
  const at::Tensor uniform = draws.to(at::kCPU, at::kDouble).contiguous();
  std::vector<int64_t> rows{
      std::min(n - 1, static_cast<int64_t>(uniform[0].item<double>() * static_cast<double>(n)))};
  at::Tensor nearest;  // squared distance to the closest center so far
  for (int64_t i = 1; i < k; ++i) {
    const at::Tensor to_last =
        squared_distances(x, x.narrow(0, rows.back(), 1)).squeeze(1).to(at::kDouble);
    nearest = nearest.defined() ? at::minimum(nearest, to_last) : to_last;
    const at::Tensor host = nearest.cpu();
    const at::Tensor sums = host.cumsum(0);  // on the CPU, where it never decreases
    const double total = sums[n - 1].item<double>();
    if (!std::isfinite(total)) {
      NTKCL_FAIL(NumericalError, "kmeans", "expected finite rows, their distances sum to ", total);
    }
    if (total == 0) {
      break;  // all rows are centers already
    }
    const at::Tensor place = at::full({1}, uniform[i].item<double>() * total, at::kDouble);
    // The first row whose sum exceeds the draw, which has a distance above 0; where rounding leaves
    // none, the last one that has.
    const int64_t row = at::searchsorted(sums, place, false, /*right=*/true).item<int64_t>();
    rows.push_back(row < n ? row : host.nonzero().max().item<int64_t>());
  }
  return x.index_select(0, at::tensor(rows, at::kLong).to(x.device()));
}

Clusters kmeans(const at::Tensor& x, const at::Tensor& centers, int64_t rounds) {
  NTKCL_CHECK(x.dim() == 2 && centers.dim() == 2 && x.size(1) == centers.size(1) &&
                  1 <= centers.size(0) && centers.size(0) <= x.size(0),
              "kmeans", "expected rows (n, C) and 1 to n centers (k, C), got ", x.sizes(), " and ",
              centers.sizes());
  NTKCL_CHECK(rounds >= 1, "kmeans", "expected at least 1 round, got ", rounds);
  const int64_t k = centers.size(0);
  Clusters clusters{centers.clone(), {}};
  for (int64_t round = 0; round < rounds; ++round) {
    const at::Tensor distances = squared_distances(x, clusters.centers);
    at::Tensor labels = distances.argmin(1);
    fill_empty(distances, labels, k);
    if (clusters.labels.defined() && labels.equal(clusters.labels)) {
      break;
    }
    clusters.labels = labels;
    clusters.centers = cluster_means(x, labels, k);
  }
  return clusters;
}

}  // namespace ntkcl::stats
