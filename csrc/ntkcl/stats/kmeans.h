#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::stats {

struct Clusters {
  at::Tensor centers;  // (k, C), means of their rows
  at::Tensor labels;   // (n) int64
};

// Mean of each cluster's rows: x (n, C), labels (n) int64 below k -> (k, C); 0 for an empty one.
at::Tensor cluster_means(const at::Tensor& x, const at::Tensor& labels, int64_t k);

// The first centers of k-means++ (Arthur and Vassilvitskii, SODA 2007): rows of x (n, C), each
// drawn with probability proportional to the squared distance to those before it. `draws` (k) are
// uniform in [0, 1). Fewer than k where x has fewer distinct rows. ValueError for no rows.
at::Tensor kmeans_plus_plus(const at::Tensor& x, const at::Tensor& draws);

// Lloyd's algorithm from the given centers until no row changes its cluster, or `rounds` are over.
// A row at equal distances goes to the earlier cluster; a cluster that loses its last row takes the
// row that is farthest from its own center.
Clusters kmeans(const at::Tensor& x, const at::Tensor& centers, int64_t rounds = 300);

}  // namespace ntkcl::stats
