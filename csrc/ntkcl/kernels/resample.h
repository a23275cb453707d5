#pragma once

#include <cstdint>

// Antialiased resampling of 8-bit RGB, equal to Pillow's `Image.resize` bit for bit.
//
// Each output pixel is a weighted mean over the input pixels within the filter's support, which
// grows with the scale when an image shrinks. Weights are computed in double, normalised, rounded
// to 22-bit fixed point. Columns are done first and rows second, with an 8-bit image in between; as
// in Pillow 13 the rows come first where the input loses more than twice as many rows as columns
// (before, never: up to a quarter of such an image's values then differ by 1).
// Cost: about 3 * width * (box height) * taps_x + 3 * width * height * taps_y multiply-adds, where
// taps = 2 * support * max(scale, 1) and the support is 1 (bilinear) or 2 (bicubic).
namespace ntkcl::kernels {

enum class Filter { kBilinear, kBicubic };

// Pixels (height, width, 3); rows are `row_bytes` apart, so a view may be a crop of a larger image.
struct ImageView {
  const uint8_t* pixels = nullptr;
  int64_t height = 0;
  int64_t width = 0;
  int64_t row_bytes = 0;

  // The pixels of a rectangle that lies inside this view; nothing is copied.
  ImageView crop(int64_t top, int64_t left, int64_t crop_height, int64_t crop_width) const {
    return {pixels + top * row_bytes + 3 * left, crop_height, crop_width, row_bytes};
  }
};

// A part of the input in pixels, fractions allowed, as `box` of Pillow's resize. Floats, since
// Pillow rounds the corners to float. Needs 0 <= left < right <= width, and so the rows.
struct Box {
  float left = 0;
  float top = 0;
  float right = 0;
  float bottom = 0;
};

// A rectangle of the resized image.
struct Window {
  int64_t top = 0;
  int64_t left = 0;
  int64_t height = 0;
  int64_t width = 0;
};

// Resizes `box` of `input` to height x width and writes the pixels inside `window` of the result
// to `output`, contiguous (window.height, window.width, 3). Only what the window needs is computed.
// The filter reads pixels beyond the box where the input has them.
void resample(const ImageView& input, const Box& box, Filter filter, int64_t height, int64_t width,
              const Window& window, uint8_t* output);

// The view's pixels as they are, without gaps.
void copy_rows(const ImageView& input, uint8_t* output);

// The whole input to the whole output.
void resample(const ImageView& input, Filter filter, int64_t height, int64_t width,
              uint8_t* output);

}  // namespace ntkcl::kernels
