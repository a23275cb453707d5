#pragma once

#include <cstdint>

// Rows of a matrix as 8-bit floating point numbers; see ops/float8_rows.h.
namespace ntkcl::kernels {

inline constexpr float kLargestFloat8 = 448.0f;  // of e4m3

template <class T>
struct Float8Rows {
  const T* x = nullptr;       // (rows, width)
  uint8_t* values = nullptr;  // (rows, width), bits of e4m3
  float* scale = nullptr;     // (rows)
  int64_t rows = 0;
  int64_t width = 0;
};

}  // namespace ntkcl::kernels
