#pragma once

#include "ntkcl/core/options.h"
#include "ntkcl/methods/head_training.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/stats/class_gaussians.h"

namespace ntkcl::methods {

// Classifier alignment on class Gaussians (RAA, section 5.3 of the specification): the head alone
// is trained again on features drawn from the Gaussian of every class seen.

// Part of the options of a method that has it.
struct GaussianAlignmentOptions {
  bool on = false;
  int64_t epochs = 5;
  double learning_rate = 0.01;
  int64_t samples = 256;
  double lowest_mean = 0.9;
  double covariance_eps = 1e-3;
  double momentum = 0.9;
  double weight_decay = 5e-4;

  template <class Visitor>
  void visit(Visitor& v) {
    v("alignment", on, anything(),
      "train the classifier on draws from a Gaussian of each class, after every task but the "
      "first");
    v("alignment_epochs", epochs, at_least(1), "epochs of the alignment");
    v("alignment_learning_rate", learning_rate, at_least(0),
      "learning rate of the alignment, cosine to 0");
    v("alignment_momentum", momentum, at_least(0).below(1), "momentum of the alignment's SGD");
    v("alignment_weight_decay", weight_decay, at_least(0), "weight decay of the alignment");
    v("alignment_samples", samples, at_least(1),
      "features drawn of each class in an epoch, and of a step");
    v("alignment_mean", lowest_mean, at_least(0).at_most(1),
      "m: the means of task k are multiplied by m + (1 - m) (k + 1) / (t + 1) after task t");
    v("covariance_eps", covariance_eps, at_least(0), "added to the diagonal of the covariances");
  }
};

// The random numbers of an epoch.
struct GaussianDraws {
  // A random order of `count` samples, which are numbered class after class: int64 (count), CPU.
  std::function<at::Tensor(int64_t epoch, int64_t count)> permutation;
  // Standard normals (samples, C) of a class, of the means' type and device.
  std::function<at::Tensor(int64_t epoch, int64_t number)> normals;
};

// Of the task that `services` is in, which hears of the progress; "alignment.order" and
// "alignment.normals" are what the draws are for.
GaussianDraws gaussian_draws(TaskServices& services, const stats::ClassGaussians& gaussians,
                             const GaussianAlignmentOptions& options);

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
