#include "ntkcl/train/normalization.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"

namespace ntkcl::train {
namespace {

at::Tensor of_channels(const std::vector<double>& values, const char* key,
                       const at::TensorOptions& like) {
  NTKCL_CHECK(values.size() == 3, "normalize", "'", key, "': expected 3 numbers, got ",
              values.size());
  return at::tensor(values, at::kDouble).view({1, 3, 1, 1}).to(like);
}

}  // namespace

Normalization::Normalization(const std::vector<double>& mean, const std::vector<double>& std,
                             const at::TensorOptions& like)
    : mean_(of_channels(mean, "mean", like)), std_(of_channels(std, "std", like)) {
  NTKCL_CHECK(std_.gt(0).all().item<bool>(), "normalize", "'std': expected positive numbers");
}

at::Tensor Normalization::operator()(const at::Tensor& images) const {
  NTKCL_CHECK(images.scalar_type() == at::kByte && images.dim() == 4 && images.size(1) == 3,
              "normalize", "expected uint8 images (B, 3, S, S), got ", images.toString(),
              images.sizes());
  return images.to(device()).to(mean_.options()).div_(255).sub_(mean_).div_(std_);
}

}  // namespace ntkcl::train
