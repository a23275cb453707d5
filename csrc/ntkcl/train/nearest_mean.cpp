#include "ntkcl/train/nearest_mean.h"

#include <ATen/ATen.h>

#include <limits>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/cosine_head.h"

namespace ntkcl::train {

void NearestMean::learn(const at::Tensor& features, const at::Tensor& labels) {
  if (!means_) {
    means_.emplace(task_.n_old, task_.n_new, features.size(1));
  }
  means_->add(features, labels);
}

void NearestMean::test(const at::Tensor& features, const at::Tensor& labels) {
  if (!prototypes_.defined()) {
    NTKCL_CHECK(means_, "data", "task ", task_.index,
                ": expected at least one readable training image, got none");
    prototypes_ = means_->result(features.scalar_type());
  }
  const at::Tensor nearest = nn::cosines(features, prototypes_).argmax(1) + task_.n_old;
  right_ += nearest.eq(labels.to(nearest.device())).sum().item<int64_t>();
  count_ += labels.size(0);
}

double NearestMean::accuracy() const {
  return count_ > 0 ? 100.0 * static_cast<double>(right_) / static_cast<double>(count_)
                    : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace ntkcl::train
