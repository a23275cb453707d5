#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace ntkcl::stats {

// A class as a few Gaussians over features, without its images: training-free task inference of
// LoRAC-IPC (arXiv 2504.13407; specification section 6). With a cluster's mean m, covariance S of
// n - 1 plus 1e-4 I, S' = S + mean(diag S) I and R the correlation matrix of S':
//
//   distance(f, class) = min over its clusters of (f - m)^T R^-1 (f - m)
//
// No C x C matrix is formed. With centred rows U / sqrt(n - 1), v = diag of U^T U,
// delta = mean(v) + 2e-4, g = (f - m) * sqrt(v + delta) and L L^T = delta I + U U^T (section 9.8):
//
//   distance = (|g|^2 - |L^-1 U g|^2) / delta
//
// and U may be any matrix of the same U^T U: the R factor of its QR, which holds no row of a
// cluster of more than two.
class ClusterGaussians {
 public:
  // A class of rows (n, C) and their clusters (n), int64 from 0 to k - 1, each with a row. A
  // cluster of one row has covariance 0 (repair 12.5).
  void add_class(const at::Tensor& rows, const at::Tensor& labels);

  // Forgets the classes from `count` on.
  void keep(int64_t count);

  int64_t classes() const { return static_cast<int64_t>(classes_.size()); }
  // features (b, C) -> squared distances to the classes (b, classes - first), in the order of
  // adding, without the first ones.
  at::Tensor distances(const at::Tensor& features, int64_t first = 0) const;

  // Tells all clusters as tensors, which may be replaced: "means" (m, C), "factors" (rows, C) of
  // all clusters one below the other, "factor_rows" (m) and "clusters" (classes) that count them.
  using StateFn = std::function<void(const std::string& name, at::Tensor& tensor)>;
  void visit_state(const std::string& prefix, const at::TensorOptions& options,
                   const StateFn& visitor);

 private:
  struct Cluster {
    at::Tensor mean;      // (C)
    at::Tensor scale;     // (C), sqrt(v + delta)
    at::Tensor factor;    // (m, C), U
    at::Tensor cholesky;  // (m, m), L
    double delta = 0;
  };
  static Cluster fit(const at::Tensor& rows);
  static Cluster derive(const at::Tensor& mean, const at::Tensor& factor);
  static at::Tensor distance(const Cluster& cluster, const at::Tensor& features);

  std::vector<std::vector<Cluster>> classes_;
};

}  // namespace ntkcl::stats
