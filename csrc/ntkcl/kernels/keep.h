#pragma once

#include <cmath>
#include <cstdint>

#include "ntkcl/core/philox.h"

// The dropout mask that a key stands for: element i is kept iff
// uniform24(philox(key, i / 4).v[i % 4]) >= p. The comparison is done on integers, so all devices
// and element types drop the same elements.
namespace ntkcl::kernels {

// The smallest 24-bit draw that is kept; p in [0, 1).
inline uint32_t keep_threshold(double p) {
  return static_cast<uint32_t>(std::ceil(p * 16777216.0));
}

NTKCL_HOST_DEVICE constexpr bool is_kept(uint32_t bits, uint32_t threshold) {
  return (bits >> 8) >= threshold;
}

}  // namespace ntkcl::kernels
