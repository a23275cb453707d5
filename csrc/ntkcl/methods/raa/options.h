#pragma once

#include "ntkcl/methods/gaussian_alignment.h"

namespace ntkcl::methods::raa {

// Defaults are the variant `corrected`; release_values() holds what `release` sets. Symbols and
// sections: Deng et al., AAAI-26, and the specification of RAA.
struct Options {
  int64_t n_adapters = 2;
  int64_t rank = 64;
  double scale = 0.1;
  double adapter_dropout = 0.1;
  std::string amalgamation = "paper";
  std::string alpha = "uniform_norm";
  double branch_loss_weight = 2.0;
  double margin = 0.0;
  double logit_scale = 20.0;
  bool share_noise = false;
  std::string drift = "paired";
  double sigma = 4.0;
  GaussianAlignmentOptions alignment{.on = true};
  std::string kappa = "cumulative";
  bool stale_gradient = false;

  template <class Visitor>
  void visit(Visitor& v) {
    v("n_adapters", n_adapters, at_least(1),
      "NA, adapter branches of a block; 1 with amalgamation none: SSIAT");
    v("rank", rank, at_least(1), "r, bottleneck of the adapters");
    v("scale", scale, anything(), "s of the adapters' residual");
    v("adapter_dropout", adapter_dropout, at_least(0).below(1), "dropout inside the adapters");
    v("amalgamation", amalgamation, one_of({"paper", "code", "none"}),
      "repair 8.2: the extra stream has the branches' weights mixed at random (paper); as released "
      "it mixes their outputs (code); or there is none");
    v("alpha", alpha, one_of({"uniform_norm", "dirichlet"}),
      "shares of the branches in the mixture: uniform numbers over their sum, or a flat Dirichlet");
    v("branch_loss_weight", branch_loss_weight, at_least(0),
      "lambda, weight of the branches' mean loss beside the mixture's (the paper's equations have "
      "1); one branch alone has 1");
    v("margin", margin, at_least(0), "m, CosFace's margin on the true class");
    v("logit_scale", logit_scale, above(0), "S, factor on the cosines");
    v("share_noise", share_noise, anything(),
      "repair 8.3: the same mixtures and dropout in both passes of a SAM step");
    v("drift", drift, one_of({"off", "paired", "unpaired"}),
      "repair 8.4: move old prototypes with the features of the same images before and after "
      "training; as released of other images, shuffled and augmented (unpaired); needs alignment");
    v("sigma", sigma, above(0), "width of the drift weights");
    alignment.visit(v);
    v("kappa", kappa, one_of({"release", "cumulative"}),
      "repair 8.5: the task of a class by the tasks' sizes, not by that of the last");
    v("stale_gradient", stale_gradient, anything(),
      "repair 8.6 switched off: the first ascent of a task holds the gradient of the last "
      "alignment step");
  }
};

// The released arithmetic, item by item of section 8.
inline OptionMap release_values() {
  return {{"amalgamation", std::string("code")},
          {"drift", std::string("unpaired")},
          {"kappa", std::string("release")},
          {"stale_gradient", true}};
}

}  // namespace ntkcl::methods::raa
