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

}  // namespace

at::Tensor logits_of(const Head& head, const at::Tensor& features, int64_t seen) {
  at::Tensor x = features;
  if (head.norm_weight.defined()) {
    x = at::layer_norm(x, {x.size(1)}, head.norm_weight, head.norm_bias, nn::kLayerNormEps);
  }
  return at::linear(x, head.weight.narrow(0, 0, seen), head.bias.narrow(0, 0, seen));
}

std::vector<at::Tensor> trained_of(const Head& head) {
  std::vector<at::Tensor> tensors{head.weight, head.bias};
  if (head.norm_weight.defined()) {
    tensors.push_back(head.norm_weight);
    tensors.push_back(head.norm_bias);
  }
  return tensors;
}

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

FeatureDraws draws_of(const FeatureClusters& clusters, int64_t rows) {
  NTKCL_CHECK(clusters.means.dim() == 3 && clusters.means.sizes() == clusters.variances.sizes(),
              kWhere, "expected means and variances (n, K, C), got ", clusters.means.sizes(),
              " and ", clusters.variances.sizes());
  const at::Tensor varies = clusters.variances.ne(0).any(2).flatten().cpu();  // (n * K)
  const at::Tensor first = varies.nonzero() * rows;                           // (m, 1)
  const at::Tensor means = clusters.means.flatten(0, 1);
  const at::Tensor deviations = (clusters.variances.flatten(0, 1) + kVarianceFloor).sqrt();
  return {.classes = clusters.means.size(0),
          .of_class = clusters.means.size(1) * rows,
          .usable = (first + at::arange(rows, at::kLong)).flatten(),
          .features = [=](const at::Tensor& numbers, const at::Tensor& normals) {
            const at::Tensor cluster = numbers.div(rows, "floor").to(means.device());
            return means.index_select(0, cluster) + deviations.index_select(0, cluster) * normals;
          }};
}

FeatureDraws draws_of(const stats::ClassGaussians& gaussians, int64_t rows) {
  return {.classes = gaussians.classes(),
          .of_class = rows,
          .usable = at::arange(gaussians.classes() * rows, at::kLong),
          .features = [&gaussians, rows](const at::Tensor& numbers, const at::Tensor& normals) {
            const at::Tensor of = numbers.div(rows, "floor");
            at::Tensor features = at::empty_like(normals);
            for (int64_t c = 0; c < gaussians.classes(); ++c) {
              const at::Tensor mine = of.eq(c).nonzero().squeeze(1).to(normals.device());
              features.index_copy_(0, mine, gaussians.draw(c, 1.0, normals.index_select(0, mine)));
            }
            return features;
          }};
}

std::vector<double> align_head(Head head, const FeatureDraws& features, int64_t n_old,
                               const HeadAlignmentOptions& options, const AlignmentDraws& draws) {
  const int64_t seen = features.classes;
  NTKCL_CHECK(head.weight.dim() == 2 && seen <= head.weight.size(0), kWhere,
              "expected at most the classes of the head ", head.weight.sizes(), ", got ", seen);
  NTKCL_CHECK(0 <= n_old && n_old < seen, kWhere, "expected 0 to ", seen - 1, " old classes, got ",
              n_old);
  const int64_t used = std::min(n_old * options.rows, features.usable.size(0));
  const auto draw = [&](int64_t epoch) -> LabelledFeatures {
    const at::NoGradGuard no_grad;
    const at::Tensor order = draws.permutation(epoch, features.usable.size(0)).narrow(0, 0, used);
    const at::Tensor numbers = features.usable.index_select(0, order);
    return {features.features(numbers, draws.normals(epoch, numbers)),
            numbers.div(features.of_class, "floor").to(head.weight.device())};
  };
  return train_head(
             trained_of(head), [&](const at::Tensor& x) { return logits_of(head, x, seen); }, draw,
             {.epochs = options.epochs,
              .learning_rate = options.learning_rate,
              .momentum = options.momentum,
              .rows = options.rows},
             kWhere)
      .losses;
}

}  // namespace ntkcl::methods
