#include "ntkcl/data/image.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

namespace ntkcl::data {
namespace {

using Bytes = std::span<const uint8_t>;

// What the file's own structure says before it is decoded.
struct Header {
  int64_t height = 0;
  int64_t width = 0;
  bool grey16 = false;
  int64_t bits = 0;  // of a row before it is deflated, if it is
};

bool has_allowed_size(const Header& header) {
  return header.height > 0 && header.width > 0 && header.height <= kMaxPixels / header.width;
}

template <class... Args>
[[noreturn]] void fail(const std::string& name, const Args&... args) {
  NTKCL_FAIL(data::CorruptImage, "decode_image", name, ": ", args...);
}

[[noreturn]] void fail_truncated(const std::string& name, std::string_view format) {
  fail(name, "expected a complete ", format, " file, got a truncated one");
}

bool starts_with(Bytes bytes, std::string_view magic, size_t at = 0) {
  return bytes.size() >= at + magic.size() &&
         std::memcmp(bytes.data() + at, magic.data(), magic.size()) == 0;
}

int64_t big_endian(const uint8_t* bytes, int count) {
  int64_t value = 0;
  for (int i = 0; i < count; ++i) {
    value = (value << 8) | bytes[i];
  }
  return value;
}

int64_t little_endian(const uint8_t* bytes, int count) {
  int64_t value = 0;
  for (int i = count - 1; i >= 0; --i) {
    value = (value << 8) | bytes[i];
  }
  return value;
}

// The position behind the entropy-coded data that begins at `at`: that of the next marker.
size_t end_of_scan(Bytes bytes, size_t at) {
  while (at + 1 < bytes.size()) {
    const auto* found =
        static_cast<const uint8_t*>(std::memchr(bytes.data() + at, 0xFF, bytes.size() - 1 - at));
    if (found == nullptr) {
      break;
    }
    at = static_cast<size_t>(found - bytes.data());
    const uint8_t code = bytes[at + 1];
    const bool is_data = code == 0x00 || (code >= 0xD0 && code <= 0xD7);
    if (!is_data && code != 0xFF) {
      return at;
    }
    at += is_data ? 2 : 1;
  }
  return bytes.size();
}

// Walks from marker to marker. libjpeg fills what is missing with grey, so a file without its end
// marker has to be found here.
Header read_jpeg(Bytes bytes, const std::string& name) {
  Header header;
  size_t at = 2;
  while (at + 4 <= bytes.size() || (at + 2 <= bytes.size() && bytes[at + 1] == 0xD9)) {
    const uint8_t code = bytes[at + 1];
    if (bytes[at] != 0xFF) {
      at = end_of_scan(bytes, at);  // stray bytes between segments are skipped, as libjpeg does
      continue;
    }
    if (code == 0xD9) {
      return header;
    }
    if (code == 0xFF) {  // fill byte
      ++at;
      continue;
    }
    if (code == 0x01 || (code >= 0xD0 && code <= 0xD8)) {  // markers without a segment
      at += 2;
      continue;
    }
    const auto length = static_cast<size_t>(big_endian(&bytes[at + 2], 2));
    if (length < 2 || at + 2 + length > bytes.size()) {
      break;
    }
    const bool is_frame =
        code >= 0xC0 && code <= 0xCF && code != 0xC4 && code != 0xC8 && code != 0xCC && length >= 8;
    if (is_frame) {
      header.height = big_endian(&bytes[at + 5], 2);
      header.width = big_endian(&bytes[at + 7], 2);
    }
    at += 2 + length;
    if (code == 0xDA) {
      at = end_of_scan(bytes, at);
    }
  }
  fail_truncated(name, "JPEG");
}

Header read_png(Bytes bytes, const std::string& name) {
  Header header;
  size_t at = 8;
  while (at + 12 <= bytes.size()) {
    const auto length = static_cast<size_t>(big_endian(&bytes[at], 4));
    if (at + 12 + length > bytes.size()) {
      break;
    }
    if (starts_with(bytes, "IHDR", at + 4) && length == 13) {
      header.width = big_endian(&bytes[at + 8], 4);
      header.height = big_endian(&bytes[at + 12], 4);
      const int64_t depth = bytes[at + 16], colour = bytes[at + 17];
      header.grey16 = depth == 16 && colour == 0;
      const int64_t channels = colour == 2 ? 3 : colour == 4 ? 2 : colour == 6 ? 4 : 1;
      header.bits = header.width * depth * channels;
    }
    if (starts_with(bytes, "IEND", at + 4)) {
      return header;
    }
    at += 12 + length;
  }
  fail_truncated(name, "PNG");
}

Header read_bmp(Bytes bytes, const std::string& name) {
  if (bytes.size() < 26) {
    fail_truncated(name, "BMP");
  }
  const int64_t offset = little_endian(&bytes[10], 4);
  const bool core = little_endian(&bytes[14], 4) == 12;  // OS/2's short header
  const int field = core ? 2 : 4;
  const uint8_t* sizes = &bytes[18];
  Header header;
  header.width = little_endian(sizes, field);
  header.height = core ? little_endian(sizes + 2, 2)
                       : std::abs(int64_t{static_cast<int32_t>(little_endian(sizes + 4, 4))});
  if (!core && bytes.size() < 34) {
    fail_truncated(name, "BMP");
  }
  if (!has_allowed_size(header)) {
    return header;  // the product below could overflow
  }
  const int64_t bits = little_endian(sizes + 2 * field + 2, 2);
  const bool run_length = !core && (bytes[30] == 1 || bytes[30] == 2);
  const int64_t needed = run_length ? 0 : (header.width * bits + 31) / 32 * 4 * header.height;
  if (offset + needed > static_cast<int64_t>(bytes.size())) {
    fail_truncated(name, "BMP");
  }
  return header;
}

// Sides are below 2^14 by the format, so only the length needs a check.
Header read_webp(Bytes bytes, const std::string& name) {
  if (little_endian(&bytes[4], 4) + 8 > static_cast<int64_t>(bytes.size())) {
    fail_truncated(name, "WebP");
  }
  return {1, 1};
}

Header read_header(Bytes bytes, const std::string& name) {
  if (starts_with(bytes, "\xFF\xD8\xFF")) {
    return read_jpeg(bytes, name);
  }
  if (starts_with(bytes, "\x89PNG\r\n\x1A\n")) {
    return read_png(bytes, name);
  }
  if (starts_with(bytes, "BM")) {
    return read_bmp(bytes, name);
  }
  if (starts_with(bytes, "RIFF") && starts_with(bytes, "WEBP", 8)) {
    return read_webp(bytes, name);
  }
  fail(name, "expected a JPEG, PNG, BMP or WebP image, got ",
       bytes.empty() ? "an empty file" : "something else");
}

// Images are decoded by many threads, one each: OpenCV is not to start its own.
void use_one_opencv_thread() {
  static const bool done = (cv::setNumThreads(1), true);
  (void)done;
}

cv::Mat decode_pixels(Bytes bytes, int flags, const std::string& name) {
  const cv::Mat encoded(1, static_cast<int>(bytes.size()), CV_8UC1,
                        const_cast<uint8_t*>(bytes.data()));
  cv::Mat decoded;
  try {
    decoded = cv::imdecode(encoded, flags);
  } catch (const cv::Exception& e) {
    fail(name, "the image is corrupt: ", e.err);
  }
  if (decoded.empty()) {
    fail(name, "the image is corrupt");
  }
  return decoded;
}

}  // namespace

Image decode_image(std::span<const uint8_t> encoded, const std::string& name) {
  const Header header = read_header(encoded, name);
  if (!has_allowed_size(header) || encoded.size() > static_cast<size_t>(kMaxEncodedBytes)) {
    fail(name, "expected 1 to ", kMaxPixels, " pixels in at most 2 GiB, got ", header.height, "x",
         header.width, " in ", encoded.size(), " bytes");
  }
  // A few bytes that claim a large image: nothing is allocated for it.
  if (header.bits / 8 * header.height / kDeflateRatio > static_cast<int64_t>(encoded.size())) {
    fail(name, "expected pixels that ", encoded.size(), " bytes can unpack to, got ", header.height,
         "x", header.width);
  }
  use_one_opencv_thread();
  const int colours = header.grey16 ? cv::IMREAD_ANYDEPTH : cv::IMREAD_COLOR;
  cv::Mat decoded = decode_pixels(encoded, colours | cv::IMREAD_IGNORE_ORIENTATION, name);
  Image image{decoded.rows, decoded.cols, {}};
  image.pixels.resize(static_cast<size_t>(3) * image.height * image.width);
  cv::Mat target(decoded.rows, decoded.cols, CV_8UC3, image.pixels.data());
  if (header.grey16) {
    cv::Mat saturated;
    decoded.convertTo(saturated, CV_8U);
    cv::cvtColor(saturated, target, cv::COLOR_GRAY2RGB);
  } else {
    cv::cvtColor(decoded, target, cv::COLOR_BGR2RGB);
  }
  NTKCL_ASSERT(target.data == image.pixels.data());
  return image;
}

}  // namespace ntkcl::data
