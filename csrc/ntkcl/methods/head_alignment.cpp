#include "ntkcl/methods/head_alignment.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "ntkcl/core/error.h"
#include "ntkcl/methods/head_training.h"
#include "ntkcl/nn/frozen_mlp.h"
#include "ntkcl/stats/kmeans.h"

namespace ntkcl::methods {
namespace {

constexpr const char* kWhere = "head_alignment";
constexpr double kVarianceFloor = 1e-4;

// Numbers of the draws of clusters that are drawn from, in order.
at::Tensor usable_draws(const FeatureClusters& clusters, int64_t rows) {
  const at::Tensor varies = clusters.variances.ne(0).any(2).flatten().cpu();  // (n * K)
  const at::Tensor first = varies.nonzero() * rows;                           // (m, 1)
  return (first + at::arange(rows, at::kLong)).flatten();
}

at::Tensor logits_of(const Head& head, const at::Tensor& features, int64_t seen) {
  at::Tensor x = features;
  if (head.norm_weight.defined()) {
    x = at::layer_norm(x, {x.size(1)}, head.norm_weight, head.norm_bias, nn::kLayerNormEps);
  }
  return at::linear(x, head.weight.narrow(0, 0, seen), head.bias.narrow(0, 0, seen));
}

void check_alignment(const Head& head, const FeatureClusters& clusters, int64_t n_old) {
  const at::Tensor& means = clusters.means;
  NTKCL_CHECK(means.dim() == 3 && means.sizes() == clusters.variances.sizes() &&
                  head.weight.dim() == 2 && means.size(0) <= head.weight.size(0) &&
                  means.size(2) == head.weight.size(1),
              kWhere, "expected means and variances (n, K, C) for a head ", head.weight.sizes(),
              ", got ", means.sizes(), " and ", clusters.variances.sizes());
  NTKCL_CHECK(0 <= n_old && n_old < means.size(0), kWhere, "expected 0 to ", means.size(0) - 1,
              " old classes, got ", n_old);
}

std::vector<at::Tensor> trained(const Head& head) {
  std::vector<at::Tensor> tensors{head.weight, head.bias};
  if (head.norm_weight.defined()) {
    tensors.push_back(head.norm_weight);
    tensors.push_back(head.norm_bias);
  }
  return tensors;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> cluster_moments(const at::Tensor& rows, const at::Tensor& labels,
                                                  int64_t clusters) {
  NTKCL_CHECK(rows.dim() == 2 && labels.dim() == 1 && rows.size(0) == labels.size(0), kWhere,
              "expected rows (m, C) and labels (m), got ", rows.sizes(), " and ", labels.sizes());
  const at::Tensor counts = at::bincount(labels, {}, clusters);
  NTKCL_CHECK(counts.size(0) == clusters && counts.gt(0).all().item<bool>(), kWhere,
              "expected a row in each of ", clusters, " clusters");
  const at::Tensor means = stats::cluster_means(rows, labels, clusters);
  const at::Tensor squares = (rows - means.index_select(0, labels)).square();
  return {means, stats::cluster_means(squares, labels, clusters)};
}

std::vector<double> align_head(Head head, const FeatureClusters& clusters, int64_t n_old,
                               const HeadAlignmentOptions& options, const AlignmentDraws& draws) {
  check_alignment(head, clusters, n_old);
  const int64_t seen = clusters.means.size(0), rows = options.rows;
  const int64_t of_class = clusters.means.size(1) * rows;
  const at::Tensor means = clusters.means.flatten(0, 1);
  const at::Tensor deviations = (clusters.variances.flatten(0, 1) + kVarianceFloor).sqrt();
  const at::Tensor usable = usable_draws(clusters, rows);
  const int64_t used = std::min(n_old * rows, usable.size(0));
  const auto draw = [&](int64_t epoch) -> LabelledFeatures {
    const at::Tensor order = draws.permutation(epoch, usable.size(0)).narrow(0, 0, used);
    const at::Tensor numbers = usable.index_select(0, order);
    const at::Tensor cluster = numbers.div(rows, "floor").to(means.device());
    return {means.index_select(0, cluster) +
                deviations.index_select(0, cluster) * draws.normals(epoch, numbers),
            numbers.div(of_class, "floor").to(means.device())};
  };
  return train_head(trained(head), [&](const at::Tensor& x) { return logits_of(head, x, seen); },
                    draw,
                    {.epochs = options.epochs,
                     .learning_rate = options.learning_rate,
                     .momentum = options.momentum,
                     .rows = rows})
      .losses;
}

}  // namespace ntkcl::methods
