#include "ntkcl/stats/cluster_gaussians.h"

#include <ATen/ATen.h>

#include <algorithm>
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

void ClusterGaussians::keep(int64_t count) {
  classes_.resize(static_cast<size_t>(std::min(count, classes())));
}

ClusterGaussians::Cluster ClusterGaussians::fit(const at::Tensor& rows) {
  const int64_t n = rows.size(0);
  const at::Tensor mean = rows.mean(0);
  at::Tensor factor = rows.new_zeros({0, rows.size(1)});
  if (n > 1) {
    const at::Tensor centred = (rows - mean) / std::sqrt(static_cast<double>(n - 1));
    factor = std::get<1>(at::linalg_qr(centred, "r"));
  }
  return derive(mean, factor);
}

ClusterGaussians::Cluster ClusterGaussians::derive(const at::Tensor& mean,
                                                   const at::Tensor& factor) {
  Cluster cluster;
  cluster.mean = mean;
  const at::Tensor variance = factor.square().sum(0);
  cluster.delta = variance.mean().item<double>() + 2 * kRidge;
  cluster.scale = (variance + cluster.delta).sqrt();
  at::Tensor gram = at::mm(factor, factor.t());
  gram.diagonal().add_(cluster.delta);
  const auto [cholesky, info] = at::linalg_cholesky_ex(gram);
  if (info.item<int64_t>() != 0 || !cholesky.isfinite().all().item<bool>()) {
    NTKCL_FAIL(NumericalError, kWhere, "expected finite features, got a cluster whose covariance ",
               "is not finite and positive definite");
  }
  cluster.cholesky = cholesky;
  cluster.factor = factor;
  return cluster;
}

at::Tensor ClusterGaussians::distance(const Cluster& cluster, const at::Tensor& features) {
  const at::Tensor scaled = (features - cluster.mean) * cluster.scale;  // g
  const at::Tensor inside = at::linalg_solve_triangular(
      cluster.cholesky, at::mm(cluster.factor, scaled.t()), /*upper=*/false);
  return (scaled.square().sum(1) - inside.square().sum(0)) / cluster.delta;
}

at::Tensor ClusterGaussians::distances(const at::Tensor& features, int64_t first) const {
  NTKCL_CHECK(!classes_.empty(), kWhere, "expected at least one class, got none");
  NTKCL_CHECK(0 <= first && first < classes(), kWhere, "expected a first class from 0 to ",
              classes() - 1, ", got ", first);
  const int64_t width = classes_.front().front().mean.size(0);
  NTKCL_CHECK(features.dim() == 2 && features.size(1) == width, kWhere, "expected features (b, ",
              width, "), got ", features.sizes());
  std::vector<at::Tensor> columns;
  for (auto clusters = classes_.begin() + first; clusters != classes_.end(); ++clusters) {
    at::Tensor nearest;
    for (const Cluster& cluster : *clusters) {
      const at::Tensor d = distance(cluster, features);
      nearest = nearest.defined() ? at::minimum(nearest, d) : d;
    }
    columns.push_back(nearest);
  }
  return at::stack(columns, 1);
}

void ClusterGaussians::visit_state(const std::string& prefix, const at::TensorOptions& options,
                                   const StateFn& visitor) {
  std::vector<at::Tensor> means_of, factors_of;
  std::vector<int64_t> rows, clusters_of;
  for (const auto& clusters : classes_) {
    clusters_of.push_back(static_cast<int64_t>(clusters.size()));
    for (const Cluster& cluster : clusters) {
      means_of.push_back(cluster.mean);
      factors_of.push_back(cluster.factor);
      rows.push_back(cluster.factor.size(0));
    }
  }
  at::Tensor means = means_of.empty() ? at::zeros({0, 0}, options) : at::stack(means_of);
  at::Tensor factors = factors_of.empty() ? at::zeros({0, 0}, options) : at::cat(factors_of);
  at::Tensor factor_rows = at::tensor(rows, at::kLong);
  at::Tensor clusters = at::tensor(clusters_of, at::kLong);
  bool changed = false;
  const auto visit = [&](const char* name, at::Tensor& tensor) {
    const auto* before = tensor.unsafeGetTensorImpl();
    const auto version = tensor._version();
    visitor(prefix + name, tensor);
    changed = changed || tensor.unsafeGetTensorImpl() != before || tensor._version() != version;
  };
  visit("means", means);
  visit("factors", factors);
  visit("factor_rows", factor_rows);
  visit("clusters", clusters);
  if (!changed) {
    return;
  }
  // Counts within bounds first: sums of hostile ones could wrap.
  const auto counts = [](const at::Tensor& t, int64_t low, int64_t high) {
    return t.dim() == 1 && t.ge(low).logical_and(t.le(high)).all().item<bool>();
  };
  NTKCL_CHECK(means.dim() == 2 && factors.dim() == 2 && means.size(1) == factors.size(1) &&
                  counts(factor_rows, 0, factors.size(0)) && counts(clusters, 1, means.size(0)) &&
                  means.size(0) == factor_rows.size(0) &&
                  clusters.sum().item<int64_t>() == factor_rows.size(0) &&
                  factor_rows.sum().item<int64_t>() == factors.size(0),
              "state", "the tensors ", prefix, "* do not fit each other");
  const auto of_state = [&](const at::Tensor& mean, const at::Tensor& factor) {
    try {
      return derive(mean, factor);
    } catch (const NumericalError& error) {
      NTKCL_FAIL(ValueError, "state", prefix, "*: ", error.what());
    }
  };
  classes_.clear();
  int64_t cluster = 0, row = 0;
  for (int64_t c = 0; c < clusters.size(0); ++c) {
    std::vector<Cluster> of_class;
    for (int64_t end = cluster + clusters[c].item<int64_t>(); cluster < end; ++cluster) {
      const auto count = factor_rows[cluster].item<int64_t>();
      of_class.push_back(of_state(means[cluster], factors.narrow(0, row, count)));
      row += count;
    }
    classes_.push_back(std::move(of_class));
  }
}

}  // namespace ntkcl::stats
