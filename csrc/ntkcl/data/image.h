#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "ntkcl/core/error.h"
#include "ntkcl/kernels/resample.h"

namespace ntkcl::data {

// An RGB image, pixels (height, width, 3) without gaps.
struct Image {
  int64_t height = 0;
  int64_t width = 0;
  std::vector<uint8_t> pixels;

  kernels::ImageView view() const { return {pixels.data(), height, width, 3 * width}; }
};

// An image that cannot be decoded in full: corrupt, truncated, or of an unknown format.
class CorruptImage : public ValueError {
  using ValueError::ValueError;
};

// Images of more pixels are refused before they are decoded (decompression bombs).
inline constexpr int64_t kMaxPixels = int64_t{1} << 28;
inline constexpr int64_t kMaxEncodedBytes = INT32_MAX;
// What deflate can make of a byte at most: a size that is claimed beyond it is none.
inline constexpr int64_t kDeflateRatio = 1032;

// Decodes JPEG, PNG, BMP or WebP to the pixels that Pillow's `convert("RGB")` gives: grey is
// repeated, a palette looked up, alpha dropped, 16-bit colour cut to its high byte, 16-bit grey
// saturated at 255; EXIF orientation is ignored. CMYK JPEGs differ from Pillow by rounding.
// Throws CorruptImage that names `name`; a truncated file is never decoded in part.
Image decode_image(std::span<const uint8_t> encoded, const std::string& name);

}  // namespace ntkcl::data
