#include "ntkcl/data/transform.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "ntkcl/core/philox.h"

namespace ntkcl::data {
namespace {

using kernels::Box;
using kernels::Filter;
using kernels::ImageView;
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

Image resize_square(const ImageView& view, Filter filter, int64_t size) {
  Image result = square(size);
  kernels::resample(view, filter, size, size, result.pixels.data());
  return result;
}

// The size x size part at (top, left) of the view resized to height x width, bicubic.
Image resize_and_crop(const ImageView& view, int64_t height, int64_t width, int64_t top,
                      int64_t left, int64_t size) {
  Image result = square(size);
  const Box whole{0, 0, static_cast<float>(view.width), static_cast<float>(view.height)};
  kernels::resample(view, whole, Filter::kBicubic, height, width, {top, left, size, size},
                    result.pixels.data());
  return result;
}

// torchvision's Resize(short_side) and CenterCrop(size); size <= short_side.
Image short_side_center_crop(const Image& image, int64_t short_side, int64_t size) {
  const auto [low, high] = std::minmax(image.height, image.width);
  const auto long_side =
      static_cast<int64_t>(static_cast<double>(short_side * high) / static_cast<double>(low));
  const int64_t height = image.height <= image.width ? short_side : long_side;
  const int64_t width = image.height <= image.width ? long_side : short_side;
  return resize_and_crop(image.view(), height, width,
                         round_even(static_cast<double>(height - size) / 2.0),
                         round_even(static_cast<double>(width - size) / 2.0), size);
}

void flip_columns(Image& image) {
  for (int64_t y = 0; y < image.height; ++y) {
    uint8_t* row = image.pixels.data() + 3 * y * image.width;
    for (int64_t left = 0, right = image.width - 1; left < right; ++left, --right) {
      std::swap_ranges(row + 3 * left, row + 3 * left + 3, row + 3 * right);
    }
  }
}

// A blend with black in single precision, cut to whole values, as Pillow's ImageEnhance.Brightness.
void scale_brightness(Image& image, float factor) {
  std::array<uint8_t, 256> table;
  for (int value = 0; value < 256; ++value) {
    table[value] = static_cast<uint8_t>(std::min(factor * static_cast<float>(value), 255.0f));
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

Image Transform::train(const Image& image, uint64_t key) const {
  const int64_t size = options_.image_size;
  if (options_.kind == "resize") {
    return test(image);
  }
  PhiloxStream draws(key);
  const bool cifar = options_.kind == "cifar";
  Image view;
  if (options_.kind == "cars") {
    const int64_t side = scaled(size, 300);
    const auto top = static_cast<int64_t>(draws.below(side - size + 1));
    const auto left = static_cast<int64_t>(draws.below(side - size + 1));
    view = resize_and_crop(image.view(), side, side, top, left, size);
  } else {
    const Window crop = random_crop(image.height, image.width, cifar ? 0.08 : 0.05, draws);
    view = resize_square(image.view().crop(crop.top, crop.left, crop.height, crop.width),
                         cifar ? Filter::kBicubic : Filter::kBilinear, size);
  }
  if (draws.uniform() < 0.5) {
    flip_columns(view);
  }
  if (cifar) {
    scale_brightness(view,
                     static_cast<float>(uniform(draws, 1.0 - kBrightness, 1.0 + kBrightness)));
  }
  return view;
}

Image Transform::test(const Image& image) const {
  const int64_t size = options_.image_size;
  if (options_.kind == "resize") {
    return resize_square(image.view(), Filter::kBicubic, size);
  }
  return short_side_center_crop(image, scaled(size, 256), size);
}

}  // namespace ntkcl::data
