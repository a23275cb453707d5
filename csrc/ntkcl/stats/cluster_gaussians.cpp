#include "ntkcl/stats/cluster_gaussians.h"

#include <ATen/ATen.h>

#include <cmath>

#include "ntkcl/core/error.h"

namespace ntkcl::stats {
namespace {

constexpr const char* kWhere = "cluster_gaussians";
constexpr double kRidge = 1e-4;  // on the covariance's diagonal

}  // namespace

void ClusterGaussians::add_class(const at::Tensor& rows, const at::Tensor& labels) {
  NTKCL_CHECK(
      rows.dim() == 2 && labels.dim() == 1 && rows.size(0) == labels.size(0) && rows.size(0) > 0,
      kWhere, "expected rows (n, C) and labels (n), n >= 1, got ", rows.sizes(), " and ",
      labels.sizes());
  NTKCL_CHECK(classes_.empty() || classes_.front().front().mean.size(0) == rows.size(1), kWhere,
              "expected rows as wide as those of the first class, got ", rows.sizes());
  NTKCL_CHECK(labels.min().item<int64_t>() >= 0, kWhere, "expected labels from 0 on, got ",
              labels.min().item<int64_t>());
  const int64_t count = labels.max().item<int64_t>() + 1;
  std::vector<Cluster> clusters;
  for (int64_t k = 0; k < count; ++k) {
    const at::Tensor own = rows.index_select(0, labels.eq(k).nonzero().squeeze(1));
    NTKCL_CHECK(own.size(0) > 0, kWhere, "expected a row in each of ", count,
                " clusters, got none in cluster ", k);
    clusters.push_back(fit(own));
  }
  classes_.push_back(std::move(clusters));
}

ClusterGaussians::Cluster ClusterGaussians::fit(const at::Tensor& rows) {
  const int64_t n = rows.size(0);
  Cluster cluster;
  cluster.mean = rows.mean(0);
  at::Tensor factor = rows.new_zeros({0, rows.size(1)});
  if (n > 1) {
    const at::Tensor centred = (rows - cluster.mean) / std::sqrt(static_cast<double>(n - 1));
    factor = std::get<1>(at::linalg_qr(centred, "r"));
  }
  const at::Tensor variance = factor.square().sum(0);
  cluster.delta = variance.mean().item<double>() + 2 * kRidge;
  cluster.scale = (variance + cluster.delta).sqrt();
  at::Tensor gram = at::mm(factor, factor.t());
  gram.diagonal().add_(cluster.delta);
  cluster.cholesky = at::linalg_cholesky(gram);
  cluster.factor = factor;
  return cluster;
}

at::Tensor ClusterGaussians::distance(const Cluster& cluster, const at::Tensor& features) {
  const at::Tensor scaled = (features - cluster.mean) * cluster.scale;  // g
  const at::Tensor inside = at::linalg_solve_triangular(
      cluster.cholesky, at::mm(cluster.factor, scaled.t()), /*upper=*/false);
  return (scaled.square().sum(1) - inside.square().sum(0)) / cluster.delta;
}

at::Tensor ClusterGaussians::distances(const at::Tensor& features) const {
  NTKCL_CHECK(!classes_.empty(), kWhere, "expected at least one class, got none");
  const int64_t width = classes_.front().front().mean.size(0);
  NTKCL_CHECK(features.dim() == 2 && features.size(1) == width, kWhere, "expected features (b, ",
              width, "), got ", features.sizes());
  std::vector<at::Tensor> columns;
  for (const auto& clusters : classes_) {
    at::Tensor nearest;
    for (const Cluster& cluster : clusters) {
      const at::Tensor d = distance(cluster, features);
      nearest = nearest.defined() ? at::minimum(nearest, d) : d;
    }
    columns.push_back(nearest);
  }
  return at::stack(columns, 1);
}

}  // namespace ntkcl::stats
