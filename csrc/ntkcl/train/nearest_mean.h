#pragma once

#include <optional>

#include "ntkcl/methods/method.h"
#include "ntkcl/stats/prototypes.h"

namespace ntkcl::train {

// How well features tell the classes of a task apart: accuracy on its test images, each taken for
// the class of the task whose mean training feature has the largest cosine with its own.
class NearestMean {
 public:
  explicit NearestMean(const methods::TaskInfo& task) : task_(task) {}

  // features (b, D), the same D throughout; labels (b), int64, of the task's classes. All training
  // images come before the first test image.
  void learn(const at::Tensor& features, const at::Tensor& labels);
  void test(const at::Tensor& features, const at::Tensor& labels);

  // Percent; NaN without test images.
  double accuracy() const;

 private:
  methods::TaskInfo task_;
  std::optional<stats::ClassMeans> means_;
  at::Tensor prototypes_;  // (classes, D), of what was learned
  int64_t right_ = 0, count_ = 0;
};

}  // namespace ntkcl::train
