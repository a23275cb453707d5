#pragma once

#include <cmath>
#include <cstdint>

#include "ntkcl/core/philox.h"
#include "ntkcl/kernels/resample.h"

// Which inputs an output of one axis reads and with which weights: Pillow's rule, in double, then
// in fixed point. The same bits on the host and on a device, whose code must be compiled without
// fused multiply-adds (nvcc --fmad=false).
namespace ntkcl::kernels {

// 8 bits of a pixel and 2 of headroom for negative lobes leave 22 for the fraction of a weight.
inline constexpr int kFractionBits = 32 - 8 - 2;
inline constexpr int32_t kHalf = 1 << (kFractionBits - 1);

// out_size outputs over [low, high) of an axis of in_size inputs.
struct AxisMap {
  float low = 0, high = 0;
  int64_t in_size = 0, out_size = 0;
  Filter filter = Filter::kBilinear;

  NTKCL_HOST_DEVICE double scale() const {
    return static_cast<double>(high - low) / static_cast<double>(out_size);
  }
  NTKCL_HOST_DEVICE double filter_scale() const { return scale() > 1.0 ? scale() : 1.0; }
  // To either side of an output's centre.
  NTKCL_HOST_DEVICE double support() const {
    return (filter == Filter::kBilinear ? 1.0 : 2.0) * filter_scale();
  }
  // The most inputs that an output reads.
  NTKCL_HOST_DEVICE int64_t most_taps() const {
    return 2 * static_cast<int64_t>(ceil(support())) + 1;
  }
  NTKCL_HOST_DEVICE double center(int64_t output) const {
    return low + (static_cast<double>(output) + 0.5) * scale();
  }
};

// Inputs first .. first + count - 1.
struct Span {
  int64_t first = 0, count = 0;
};

// Pillow's rounding of a position, by truncation.
NTKCL_HOST_DEVICE inline int64_t rounded(double position) {
  return static_cast<int64_t>(position + 0.5);  // NOLINT(bugprone-incorrect-roundings)
}

NTKCL_HOST_DEVICE inline Span span_of(const AxisMap& axis, int64_t output) {
  const double center = axis.center(output), support = axis.support();
  const int64_t low = rounded(center - support), high = rounded(center + support);
  const int64_t first = low > 0 ? low : 0, last = high < axis.in_size ? high : axis.in_size;
  return {first, last - first};
}

NTKCL_HOST_DEVICE inline double bilinear(double x) {
  x = fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Keys' cubic with a = -0.5.
NTKCL_HOST_DEVICE inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = fabs(x);
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  }
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

NTKCL_HOST_DEVICE inline int32_t fixed_point(double weight) {
  const double scaled = weight * (1 << kFractionBits);
  return static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

// Writes the weights of what `output` reads, most_taps() at most, in fixed point. `exact`: room for
// as many on the way.
NTKCL_HOST_DEVICE inline Span write_weights(const AxisMap& axis, int64_t output, double* exact,
                                            int32_t* weights) {
  const Span span = span_of(axis, output);
  const double center = axis.center(output), inverse = 1.0 / axis.filter_scale();
  double sum = 0.0;
  for (int64_t k = 0; k < span.count; ++k) {
    const double at = (static_cast<double>(span.first + k) - center + 0.5) * inverse;
    exact[k] = axis.filter == Filter::kBilinear ? bilinear(at) : bicubic(at);
    sum += exact[k];
  }
  for (int64_t k = 0; k < span.count; ++k) {
    weights[k] = fixed_point(sum != 0.0 ? exact[k] / sum : exact[k]);
  }
  return span;
}

// A sum over pixels times weights, begun with kHalf, as a pixel.
NTKCL_HOST_DEVICE inline uint8_t pixel_of(int32_t sum) {
  const int32_t value = sum >> kFractionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Whether rows are done before columns: Pillow's choice since version 13, from the whole input
// whatever the box.
NTKCL_HOST_DEVICE inline bool rows_come_first(int64_t in_height, int64_t in_width, int64_t height,
                                              int64_t width) {
  return in_height > height && in_height - height > 2 * (in_width - width);
}

}  // namespace ntkcl::kernels
