#pragma once

#include "ntkcl/methods/head_training.h"
#include "ntkcl/stats/class_gaussians.h"

namespace ntkcl::methods {

// Classifier alignment on class Gaussians (RAA, section 5.3 of the specification): the head alone
// is trained again on features drawn from the Gaussian of every class seen.

struct GaussianAlignmentOptions {
  int64_t epochs = 5;
  double learning_rate = 0.01;  // of the first epoch; cosine to 0
  double momentum = 0.9;
  double weight_decay = 5e-4;
  int64_t samples = 256;  // of each class in an epoch, and of a step
};

// The random numbers of an epoch.
struct GaussianDraws {
  // A random order of `count` samples, which are numbered class after class: int64 (count), CPU.
  std::function<at::Tensor(int64_t epoch, int64_t count)> permutation;
  // Standard normals (samples, C) of a class, of the means' type and device.
  std::function<at::Tensor(int64_t epoch, int64_t number)> normals;
};

// What the means are multiplied by, of each class: lowest + (1 - lowest) (task_c + 1) / (t + 1), so
// that features of older classes are drawn nearer to the origin. tasks: of each class, the last t.
std::vector<double> mean_factors(const std::vector<int64_t>& tasks, int64_t task, double lowest);

// Trains `parameters` on x = factor_c mu_c + L_c xi of every class, in random order.
HeadTraining align_on_gaussians(const std::vector<at::Tensor>& parameters,
                                const std::function<at::Tensor(const at::Tensor& features)>& logits,
                                const stats::ClassGaussians& gaussians,
                                const std::vector<double>& factors,
                                const GaussianAlignmentOptions& options,
                                const GaussianDraws& draws);

}  // namespace ntkcl::methods
