#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace ntkcl::train {

// Images as the backbone sees them.
class Normalization {
 public:
  // Mean and standard deviation of each channel, of pixels in [0, 1]; `like`: the backbone's type
  // and device. ValueError unless there are three of each, the latter positive.
  Normalization(const std::vector<double>& mean, const std::vector<double>& std,
                const at::TensorOptions& like);

  // Of uint8 images (B, 3, S, S) on any device.
  at::Tensor operator()(const at::Tensor& images) const;
  at::Device device() const { return mean_.device(); }

 private:
  at::Tensor mean_, std_;  // (1, 3, 1, 1)
};

}  // namespace ntkcl::train
