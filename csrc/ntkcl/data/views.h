#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ntkcl/data/transform.h"
#include "ntkcl/kernels/view_batch.h"

namespace ntkcl::data {

// Views of a batch that are still to be made: pixels that they are made of, and how. The device
// makes them, to the same bits as Transform::make_view.
class RawViews {
 public:
  // Of images that lie in `crops`, (height, width, 3) each: what `plans` keep of an image's crop,
  // size x size.
  RawViews(const std::vector<std::vector<uint8_t>>& crops, const std::vector<ViewPlan>& plans,
           int64_t size, bool pin_memory);

  // uint8 (B, 3, size, size).
  at::Tensor on(at::Device device) const;

 private:
  int64_t size_ = 0, taps_ = 0, between_bytes_ = 0, most_between_ = 0;
  at::Tensor pixels_;  // uint8
  at::Tensor jobs_;    // uint8, kernels::ViewJob each
};

// Whether a plan's crop, and the weights by which it is resized, take memory in proportion to its
// view. An image may be of any size, and thousands of times as long as it is wide.
bool is_cheap_to_hand_over(const ViewPlan& plan, int64_t size);
// The bytes of a plan's crop, (height, width, 3).
std::vector<uint8_t> crop_of(const Image& image, const ViewPlan& plan);

// Starts what kernels::fill_views_cpu does on the current CUDA stream. ValueError in a build
// without CUDA.
void fill_views_on_cuda(const kernels::ViewBatch& batch, at::Device device);

}  // namespace ntkcl::data
