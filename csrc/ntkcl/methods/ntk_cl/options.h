#pragma once

#include "ntkcl/methods/gaussian_alignment.h"

namespace ntkcl::methods::ntk_cl {

// Defaults that both variants share; variants() holds what `release` and `corrected` set.
// Symbols and sections: Liu et al., arXiv 2407.17120.
struct Options {
  std::string mode = "channel";
  int64_t frozen_lists = 1;
  bool pretrained_feature = false;
  int64_t rank = 16;
  int64_t prompt_tokens = 10;
  double channel_scale = 1.0;
  double prompt_scale = 0.1;
  double adapter_dropout = 0.1;
  std::string fusion = "cross_attention";
  int64_t fusion_heads = 8;
  double fusion_dropout = 0.1;
  double eta = 0.2;
  double upsilon = 1e-4;
  double lambda = 1e-3;
  int64_t orth_rank = 40;
  double temperature = 0.1;
  double alpha = 0.1;
  double beta = 1.0;
  double gamma = 0.3;
  std::string prompts = "gated";
  std::string orth = "projection";
  std::string dissimilarity = "infonce";
  std::string ema_count = "list";
  double head_sigma_init = 16.0;
  bool head_sigma_decays = false;
  bool drift_compensation = true;
  double drift_tau = 0.4;
  std::string drift = "off";
  double sigma = 4.0;
  GaussianAlignmentOptions alignment;
  double alignment_logit_scale = 20.0;
  double later_lr_factor = 1.0;
  bool first_task_only = false;

  template <class Visitor>
  void visit(Visitor& v) {
    v("mode", mode, one_of({"both", "channel", "patch"}), "sub-networks in use");
    v("frozen_lists", frozen_lists, at_least(1),
      "K, frozen lists of each kind, updated by the adaptive EMA");
    v("pretrained_feature", pretrained_feature, anything(),
      "put the plain backbone's feature in front of the sections");
    v("rank", rank, at_least(1), "r, bottleneck of the adapters");
    v("prompt_tokens", prompt_tokens, at_least(1), "P, prompt tokens that each block generates");
    v("channel_scale", channel_scale, anything(), "s of the adapters' residual");
    v("prompt_scale", prompt_scale, anything(), "s of the carried prompts");
    v("adapter_dropout", adapter_dropout, at_least(0).below(1), "dropout inside the adapters");
    v("fusion", fusion,
      one_of({"attention", "concat", "multimodal", "vae", "lstm", "gru", "cross_attention"}),
      "how the channel and the patch feature are fused");
    v("fusion_heads", fusion_heads, at_least(1), "heads of the fusion's attention");
    v("fusion_dropout", fusion_dropout, at_least(0).below(1), "dropout over the fusion's heads");
    v("eta", eta, at_least(0), "weight of the dissimilarity loss L_dis");
    v("upsilon", upsilon, at_least(0), "weight of the orthogonality loss L_orth");
    v("lambda", lambda, at_least(0), "weight of the regulariser L_reg");
    v("orth_rank", orth_rank, at_least(1), "largest number of basis vectors in L_orth");
    v("temperature", temperature, above(0), "temperature of L_dis");
    v("alpha", alpha, anything(), "score multiplier of the current section");
    v("beta", beta, anything(), "score multiplier of the plain backbone's section");
    v("gamma", gamma, anything(), "score multiplier of the frozen sections");
    v("prompts", prompts, one_of({"dead", "gated"}),
      "repair 8.1: prompts that learn, behind a gate that starts at 0");
    v("orth", orth, one_of({"signed_sum", "projection"}),
      "repair 8.3: L_orth as the energy inside the old classes' span");
    v("dissimilarity", dissimilarity, one_of({"release", "infonce"}),
      "repair 8.4: L_dis as InfoNCE");
    v("ema_count", ema_count, one_of({"task", "list"}),
      "repair 8.6: weights of the running mean count the tasks in the list");
    v("head_sigma_init", head_sigma_init, above(0),
      "repair 8.8: first scale of the training head's cosines");
    v("head_sigma_decays", head_sigma_decays, anything(), "weight decay on the head's scale");
    v("drift_compensation", drift_compensation, anything(),
      "repair 8.8: move old prototypes with the features");
    v("drift_tau", drift_tau, above(0), "width of the drift weights");
    v("drift", drift, one_of({"off", "paired"}),
      "RAA's drift in the place of drift_compensation: weights of whole features as they are");
    v("sigma", sigma, above(0), "width of its weights");
    alignment.visit(v);
    v("alignment_logit_scale", alignment_logit_scale, above(0),
      "factor on the weighted mean of the sections' cosines in the alignment");
    v("later_lr_factor", later_lr_factor, at_least(0),
      "factor on the learning rate after the first task");
    v("first_task_only", first_task_only, anything(), "train in the first task alone");
  }
};

// The released arithmetic, item by item of section 8.
inline OptionMap release_values() {
  return {{"mode", std::string("both")},
          {"prompts", std::string("dead")},
          {"fusion", std::string("attention")},
          {"orth", std::string("signed_sum")},
          {"dissimilarity", std::string("release")},
          {"ema_count", std::string("task")},
          {"head_sigma_init", 1.0},
          {"head_sigma_decays", true},
          {"channel_scale", 0.1},
          {"drift_compensation", false}};
}

}  // namespace ntkcl::methods::ntk_cl
