#include "ntkcl/data/views.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace ntkcl::data {
namespace {

using kernels::ViewJob;
static_assert(std::is_trivially_copyable_v<ViewJob>);

at::Tensor bytes(int64_t count, bool pin_memory) {
  return at::empty({count}, at::TensorOptions(at::kByte).pinned_memory(pin_memory));
}

ViewJob job_of(const ViewPlan& plan) {
  return {.height = plan.crop.height,
          .width = plan.crop.width,
          .resized_height = plan.height,
          .resized_width = plan.width,
          .top = plan.top,
          .left = plan.left,
          .filter = plan.filter,
          .mirrored = plan.mirrored,
          .brightness = plan.brightness};
}

}  // namespace

bool is_cheap_to_hand_over(const ViewPlan& plan, int64_t size) {
  constexpr int64_t kMostPixels = 16, kMostTaps = 64;  // of a view's pixel, of an output
  const ViewJob job = job_of(plan);
  return job.height * job.width <= kMostPixels * size * size &&
         std::max(job.columns().most_taps(), job.rows().most_taps()) <= kMostTaps;
}

std::vector<uint8_t> crop_of(const Image& image, const ViewPlan& plan) {
  const auto& [top, left, height, width] = plan.crop;
  std::vector<uint8_t> pixels(static_cast<size_t>(3 * height * width));
  kernels::copy_rows(image.view().crop(top, left, height, width), pixels.data());
  return pixels;
}

RawViews::RawViews(const std::vector<std::vector<uint8_t>>& crops,
                   const std::vector<ViewPlan>& plans, int64_t size, bool pin_memory)
    : size_(size) {
  std::vector<ViewJob> jobs;
  int64_t pixels = 0;
  for (const ViewPlan& plan : plans) {
    ViewJob job = job_of(plan);
    kernels::complete(job, size_);
    job.pixels = pixels;
    job.between = between_bytes_;
    pixels += 3 * job.height * job.width;
    between_bytes_ += 3 * job.between_pixels(size_);
    most_between_ = std::max(most_between_, job.between_pixels(size_));
    taps_ = std::max({taps_, job.columns().most_taps(), job.rows().most_taps()});
    jobs.push_back(job);
  }
  pixels_ = bytes(pixels, pin_memory);
  uint8_t* target = pixels_.mutable_data_ptr<uint8_t>();
  for (const std::vector<uint8_t>& crop : crops) {
    target = std::copy(crop.begin(), crop.end(), target);
  }
  jobs_ = bytes(static_cast<int64_t>(jobs.size() * sizeof(ViewJob)), pin_memory);
  std::memcpy(jobs_.mutable_data_ptr<uint8_t>(), jobs.data(), jobs.size() * sizeof(ViewJob));
}

at::Tensor RawViews::on(at::Device device) const {
  const auto images = jobs_.numel() / static_cast<int64_t>(sizeof(ViewJob));
  const auto here = [&](at::ScalarType type) { return at::TensorOptions(type).device(device); };
  const at::Tensor pixels = pixels_.to(device, /*non_blocking=*/true),
                   jobs = jobs_.to(device, /*non_blocking=*/true),
                   spans = at::empty({images, 2, size_, 2}, here(at::kLong)),
                   exact = at::empty({images, 2, size_, taps_}, here(at::kDouble)),
                   weights = at::empty({images, 2, size_, taps_}, here(at::kInt)),
                   between = at::empty({between_bytes_}, here(at::kByte));
  at::Tensor out = at::empty({images, 3, size_, size_}, here(at::kByte));
  static_assert(sizeof(kernels::Span) == 2 * sizeof(int64_t));
  const kernels::ViewBatch batch{
      .images = images,
      .size = size_,
      .taps = taps_,
      .most_between = most_between_,
      .pixels = pixels.const_data_ptr<uint8_t>(),
      .jobs = reinterpret_cast<const ViewJob*>(jobs.const_data_ptr<uint8_t>()),
      .spans = reinterpret_cast<kernels::Span*>(spans.mutable_data_ptr<int64_t>()),
      .exact = exact.mutable_data_ptr<double>(),
      .weights = weights.mutable_data_ptr<int32_t>(),
      .between = between.mutable_data_ptr<uint8_t>(),
      .out = out.mutable_data_ptr<uint8_t>()};
  if (device.is_cuda()) {
    fill_views_on_cuda(batch, device);
  } else {
    kernels::fill_views_cpu(batch);
  }
  return out;
}

}  // namespace ntkcl::data
