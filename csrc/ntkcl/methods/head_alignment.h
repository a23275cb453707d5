#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "ntkcl/stats/class_gaussians.h"

namespace ntkcl::methods {

// Task-adaptive prediction of LoRAC-IPC: the head alone is trained again on features drawn from
// the Gaussians that are kept of every class seen (arXiv 2504.13407; specification section 7).

// Diagonal Gaussians of each class's clusters, over features as they come.
struct FeatureClusters {
  at::Tensor means;      // (n, K, C)
  at::Tensor variances;  // (n, K, C), biased; a cluster of variance 0 is not drawn from
};

// Mean and biased variance of each cluster: rows (m, C), labels (m) int64 -> (K, C) twice.
std::pair<at::Tensor, at::Tensor> cluster_moments(const at::Tensor& rows, const at::Tensor& labels,
                                                  int64_t clusters);

struct HeadAlignmentOptions {
  int64_t epochs = 50;
  double learning_rate = 0.005;  // of the first epoch; cosine to 0
  double momentum = 0.9;
  int64_t rows = 320;  // n_s: draws of each cluster in an epoch, and of a step
};

// What is trained: logits = weight norm(f) + bias over all classes, of which the first n are seen.
struct Head {
  at::Tensor weight, bias;            // (classes, C), (classes)
  at::Tensor norm_weight, norm_bias;  // (C), undefined without a LayerNorm before the head
};

// What of it is trained.
std::vector<at::Tensor> trained_of(const Head& head);
// Of features (b, C) for the first `seen` classes: (b, seen).
at::Tensor logits_of(const Head& head, const at::Tensor& features, int64_t seen);

// The random numbers of an epoch, whose n * K * n_s draws are numbered by class, cluster, draw.
struct AlignmentDraws {
  // A random order of `count` draws: int64 (count) on the CPU.
  std::function<at::Tensor(int64_t epoch, int64_t count)> permutation;
  // Standard normals of the draws of these numbers: int64 (m) -> (m, C) of the means' type, device.
  std::function<at::Tensor(int64_t epoch, const at::Tensor& numbers)> normals;
};

// An epoch's draws, numbered class after class, and how features are made of them.
struct FeatureDraws {
  int64_t classes = 0;
  int64_t of_class = 0;  // numbers of a class
  at::Tensor usable;     // (m) int64 on the CPU: numbers that are drawn
  // numbers (b) and standard normals (b, C) -> features (b, C)
  std::function<at::Tensor(const at::Tensor& numbers, const at::Tensor& normals)> features;
};
// `rows` draws of each cluster; or of each class from one Gaussian of full covariance, which must
// outlive what is returned. ValueError for clusters that do not fit.
FeatureDraws draws_of(const FeatureClusters& clusters, int64_t rows);
FeatureDraws draws_of(const stats::ClassGaussians& gaussians, int64_t rows);

// n_old steps an epoch over the epoch's draws in random order, SGD; draws that no step uses are not
// made. Changes the head in place and returns each step's cross-entropy, over the seen classes.
// ValueError for what does not fit, NumericalError for a cross-entropy that is not finite.
std::vector<double> align_head(Head head, const FeatureDraws& features, int64_t n_old,
                               const HeadAlignmentOptions& options, const AlignmentDraws& draws);

}  // namespace ntkcl::methods
