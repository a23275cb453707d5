#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace ntkcl::methods {

// Training of a head on features instead of images, as head alignment does it.

struct LabelledFeatures {
  at::Tensor features;  // (m, C), in the order of training
  at::Tensor labels;    // (m) int64
};

struct HeadTrainingOptions {
  int64_t epochs = 0;
  double learning_rate = 0;  // of the first epoch; cosine to 0, by epochs
  double momentum = 0;
  double weight_decay = 0;
  int64_t rows = 1;  // features a step; a short last step is made
};

struct HeadTraining {
  std::vector<double> losses;         // each step's cross-entropy
  std::vector<at::Tensor> gradients;  // of the last step; none without steps
};

// SGD on the cross-entropy of `logits` over each epoch's features. Changes the parameters, leaves
// that require no gradient yet, in place. NumericalError "[where] ..." after an epoch in which a
// cross-entropy is not finite.
HeadTraining train_head(const std::vector<at::Tensor>& parameters,
                        const std::function<at::Tensor(const at::Tensor& features)>& logits,
                        const std::function<LabelledFeatures(int64_t epoch)>& draw,
                        const HeadTrainingOptions& options, const char* where);

}  // namespace ntkcl::methods
