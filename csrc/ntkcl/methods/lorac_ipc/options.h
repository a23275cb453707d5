#pragma once

#include "ntkcl/core/options.h"

namespace ntkcl::methods::lorac_ipc {

// Defaults are the variant `corrected`; release_values() holds what `release` sets. Symbols and
// sections: Ling et al., arXiv 2504.13407, and the specification of LoRAC-IPC.
struct Options {
  std::string placement = "all";
  int64_t rank = 16;
  int64_t lora_depth = 0;
  std::string init = "uniform";
  double lambda = 1.0;
  double omega_lr_factor = 0.1;
  double clip_norm = 1.0;
  double ipc_threshold = 0.05;
  bool new_mask = false;
  double importance_decay = 0.85;
  double uncertainty_decay = 0.85;
  int64_t importance_window = 0;
  std::string importance_of = "matrix";
  std::string importance_average = "ema";
  std::string inference = "per_image";
  int64_t inference_clusters = 4;
  bool predict_within_task = false;
  bool alignment = true;
  std::string alignment_recipe = "own";
  std::string alignment_covariance = "diagonal";
  int64_t alignment_clusters = 10;
  int64_t alignment_epochs = 50;
  double alignment_learning_rate = 0.005;
  int64_t alignment_draws = 320;
  bool train_aligned_head = true;
  std::string drift = "off";
  double sigma = 4.0;
  std::string k_mask = "own";
  std::string selection = "exact";
  bool mask_unseen = true;
  std::string class_lookup = "class";
  std::string small_clusters = "shrink";
  std::string moco_norm = "pretrained";

  template <class Visitor>
  void visit(Visitor& v) {
    v("placement", placement, one_of({"qkvo", "all"}),
      "matrices with LoRA: those of attention, or of attention and MLP");
    v("rank", rank, at_least(1), "r, rank of a task's module");
    v("lora_depth", lora_depth, at_least(0), "blocks with LoRA, from the first; 0: all");
    v("init", init, one_of({"uniform", "orthogonal"}),
      "first A of a module: uniform, or orthonormal columns orthogonal to all A before (T tasks of "
      "rank r need T r columns of a matrix)");
    v("lambda", lambda, at_least(0), "weight of the orthogonality penalty");
    v("omega_lr_factor", omega_lr_factor, at_least(0),
      "factor on the learning rate of the old modules' weights omega");
    v("clip_norm", clip_norm, above(0), "largest norm of a step's gradient");
    v("ipc_threshold", ipc_threshold, at_least(0).at_most(1),
      "share of the matrices that freezes after each task; 0: LoRAC without IPC");
    v("new_mask", new_mask, anything(), "count the share among matrices not yet frozen");
    v("importance_decay", importance_decay, at_least(0).below(1),
      "decay of the running mean of importances");
    v("uncertainty_decay", uncertainty_decay, at_least(0).below(1),
      "decay of the running mean of their deviations");
    v("importance_window", importance_window, at_least(0),
      "last steps of a task that importances are taken from; 0: all in float64, else so many that "
      "earlier ones would weigh less than 1e-9 (128 with the default decays)");
    v("importance_of", importance_of, one_of({"matrix", "entry"}),
      "what is averaged over the steps: a number for each matrix, or for each of its entries, "
      "which "
      "takes twice the matrices' memory");
    v("importance_average", importance_average, one_of({"ema", "epoch"}),
      "running means that forget, or plain means over a task's last epoch");
    v("inference", inference, one_of({"per_image", "none", "vote_by_test_task"}),
      "the snapshot that classifies an image: that of the task inferred from the image; the last; "
      "or by a vote of all test images of the same true task, which uses the labels of the test "
      "images and is no honest result");
    v("inference_clusters", inference_clusters, at_least(1),
      "Gaussians of each class for task inference");
    v("predict_within_task", predict_within_task, anything(),
      "predict among the classes of the inferred task alone");
    v("alignment", alignment, anything(), "align the head after every task but the first");
    v("alignment_recipe", alignment_recipe, one_of({"own", "raa"}),
      "the method's own, which the other keys of head alignment are of; or RAA's, with the numbers "
      "published for it");
    v("alignment_covariance", alignment_covariance, one_of({"diagonal", "full"}),
      "covariances for head alignment; full: one Gaussian a class, whatever alignment_clusters is");
    v("alignment_clusters", alignment_clusters, at_least(1),
      "Gaussians of each class for head alignment");
    v("alignment_epochs", alignment_epochs, at_least(1), "epochs of head alignment");
    v("alignment_learning_rate", alignment_learning_rate, at_least(0),
      "learning rate of head alignment, cosine to 0");
    v("alignment_draws", alignment_draws, at_least(1),
      "features drawn from each Gaussian in an epoch, and of a step");
    v("train_aligned_head", train_aligned_head, anything(),
      "the next task goes on from the aligned head; else from the head as it was trained");
    v("drift", drift, one_of({"off", "paired"}),
      "RAA's drift: move the means for head alignment with the features of the last task; for "
      "inference = none, as else an image meets the weights that its class was learned with; needs "
      "alignment");
    v("sigma", sigma, above(0), "width of the drift weights");
    v("k_mask", k_mask, one_of({"query", "own"}), "repair 12.1: the mask of k's current module");
    v("selection", selection, one_of({"release", "exact"}),
      "repair 12.2: freeze exactly so many matrices");
    v("mask_unseen", mask_unseen, anything(), "repair 12.3: only classes seen are predicted");
    v("class_lookup", class_lookup, one_of({"position", "class"}),
      "repair 12.4: the nearest class itself, not its place among the classes seen, has a task");
    v("small_clusters", small_clusters, one_of({"error", "shrink"}),
      "repair 12.5: fewer clusters where a class has few images");
    v("moco_norm", moco_norm, one_of({"new", "pretrained"}),
      "repair 12.6: keep the pretrained final LayerNorm (the release trains a new one for MoCo)");
  }
};

// The released arithmetic, item by item of section 12. (Item 6 concerns MoCo's weights alone: its
// presets set it.)
inline OptionMap release_values() {
  return {{"k_mask", std::string("query")},
          {"selection", std::string("release")},
          {"mask_unseen", false},
          {"class_lookup", std::string("position")},
          {"small_clusters", std::string("error")}};
}

}  // namespace ntkcl::methods::lorac_ipc
