#include "ntkcl/data/transform.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "ntkcl/core/philox.h"
#include "ntkcl/kernels/view_batch.h"

namespace ntkcl::data {
namespace {

using kernels::Box;
using kernels::Filter;
using kernels::Window;

constexpr int kCropTries = 10;
constexpr double kMinRatio = 3.0 / 4.0;
constexpr double kMaxRatio = 4.0 / 3.0;
constexpr double kBrightness = 63.0 / 255.0;

// Halves to even, as Python's round().
int64_t round_even(double value) {
  return static_cast<int64_t>(std::nearbyint(value));
}

double uniform(PhiloxStream& draws, double low, double high) {
  return low + (high - low) * draws.uniform();
}

// The largest central crop with a ratio that is allowed.
Window central_crop(int64_t height, int64_t width) {
  const double ratio = static_cast<double>(width) / static_cast<double>(height);
  Window crop{0, 0, height, width};
  if (ratio < kMinRatio) {
    crop.height = round_even(static_cast<double>(width) / kMinRatio);
  } else if (ratio > kMaxRatio) {
    crop.width = round_even(static_cast<double>(height) * kMaxRatio);
  }
  crop.top = (height - crop.height) / 2;
  crop.left = (width - crop.width) / 2;
  return crop;
}

// torchvision's RandomResizedCrop.
Window random_crop(int64_t height, int64_t width, double min_scale, PhiloxStream& draws) {
  const auto area = static_cast<double>(height) * static_cast<double>(width);
  for (int i = 0; i < kCropTries; ++i) {
    const double target = area * uniform(draws, min_scale, 1.0);
    const double ratio = std::exp(uniform(draws, std::log(kMinRatio), std::log(kMaxRatio)));
    const int64_t crop_width = round_even(std::sqrt(target * ratio));
    const int64_t crop_height = round_even(std::sqrt(target / ratio));
    if (0 < crop_width && crop_width <= width && 0 < crop_height && crop_height <= height) {
      const auto top = static_cast<int64_t>(draws.below(height - crop_height + 1));
      const auto left = static_cast<int64_t>(draws.below(width - crop_width + 1));
      return {top, left, crop_height, crop_width};
    }
  }
  return central_crop(height, width);
}

Image square(int64_t size) {
  return {size, size, std::vector<uint8_t>(static_cast<size_t>(3 * size * size))};
}

// The whole of `crop`, resized to size x size.
ViewPlan resize_square(const Window& crop, Filter filter, int64_t size) {
  return {.crop = crop, .height = size, .width = size, .filter = filter};
}

// torchvision's Resize(short_side) and CenterCrop(size); size <= short_side.
ViewPlan short_side_center_crop(const Window& whole, int64_t short_side, int64_t size) {
  const auto [low, high] = std::minmax(whole.height, whole.width);
  const auto long_side =
      static_cast<int64_t>(static_cast<double>(short_side * high) / static_cast<double>(low));
  ViewPlan plan{.crop = whole};
  plan.height = whole.height <= whole.width ? short_side : long_side;
  plan.width = whole.height <= whole.width ? long_side : short_side;
  plan.top = round_even(static_cast<double>(plan.height - size) / 2.0);
  plan.left = round_even(static_cast<double>(plan.width - size) / 2.0);
  return plan;
}

void flip_columns(Image& image) {
  for (int64_t y = 0; y < image.height; ++y) {
    uint8_t* row = image.pixels.data() + 3 * y * image.width;
    for (int64_t left = 0, right = image.width - 1; left < right; ++left, --right) {
      std::swap_ranges(row + 3 * left, row + 3 * left + 3, row + 3 * right);
    }
  }
}

void scale_brightness(Image& image, float factor) {
  std::array<uint8_t, 256> table;
  for (int value = 0; value < 256; ++value) {
    table[value] = kernels::brighter(static_cast<uint8_t>(value), factor);
  }
  for (uint8_t& value : image.pixels) {
    value = table[value];
  }
}

int64_t scaled(int64_t size, int64_t of_224) {
  return round_even(static_cast<double>(size * of_224) / 224.0);
}

}  // namespace

Transform::Transform(TransformOptions options) : options_(std::move(options)) {
  apply(values_of(options_), options_, "transform");
}

ViewPlan Transform::plan_train(int64_t height, int64_t width, uint64_t key) const {
  const int64_t size = options_.image_size;
  if (options_.kind == "resize") {
    return plan_test(height, width);
  }
  PhiloxStream draws(key);
  const bool cifar = options_.kind == "cifar";
  ViewPlan plan;
  if (options_.kind == "cars") {
    const int64_t side = scaled(size, 300);
    plan = {.crop = {0, 0, height, width}, .height = side, .width = side};
    plan.top = static_cast<int64_t>(draws.below(side - size + 1));
    plan.left = static_cast<int64_t>(draws.below(side - size + 1));
  } else {
    plan = resize_square(random_crop(height, width, cifar ? 0.08 : 0.05, draws),
                         cifar ? Filter::kBicubic : Filter::kBilinear, size);
  }
  plan.mirrored = draws.uniform() < 0.5;
  if (cifar) {
    plan.brightness = static_cast<float>(uniform(draws, 1.0 - kBrightness, 1.0 + kBrightness));
  }
  return plan;
}

ViewPlan Transform::plan_test(int64_t height, int64_t width) const {
  const int64_t size = options_.image_size;
  const Window whole{0, 0, height, width};
  return options_.kind == "resize" ? resize_square(whole, Filter::kBicubic, size)
                                   : short_side_center_crop(whole, scaled(size, 256), size);
}

Image Transform::make_view(const Image& image, const ViewPlan& plan) const {
  const auto& [top, left, height, width] = plan.crop;
  const int64_t size = options_.image_size;
  Image view = square(size);
  const Box whole{0, 0, static_cast<float>(width), static_cast<float>(height)};
  kernels::resample(image.view().crop(top, left, height, width), whole, plan.filter, plan.height,
                    plan.width, {plan.top, plan.left, size, size}, view.pixels.data());
  if (plan.mirrored) {
    flip_columns(view);
  }
  if (plan.brightness != 1.0f) {
    scale_brightness(view, plan.brightness);
  }
  return view;
}

Image Transform::train(const Image& image, uint64_t key) const {
  return make_view(image, plan_train(image.height, image.width, key));
}

Image Transform::test(const Image& image) const {
  return make_view(image, plan_test(image.height, image.width));
}

}  // namespace ntkcl::data
