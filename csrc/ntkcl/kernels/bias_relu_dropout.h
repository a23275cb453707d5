#pragma once

#include <cstdint>

// y = relu(x + bias) * keep / (1 - p) over rows of `width` elements, and its backward pass; rows
// come in groups of one size, each with a bias of its own. See ops/bias_relu_dropout.h for the
// definition.
namespace ntkcl::kernels {

enum class Dropout { kNone, kMask, kKey };

template <class T>
struct BiasReluDropout {
  const T* x = nullptr;     // (rows, width)
  const T* bias = nullptr;  // (groups, width)
  T* y = nullptr;           // (rows, width)
  int64_t rows = 0;         // of all groups
  int64_t width = 0;
  int64_t groups = 1;
  Dropout dropout = Dropout::kNone;
  double scale = 1;                     // 1 / (1 - p)
  const uint8_t* mask = nullptr;        // kMask: (rows, width), 0 where dropped
  uint64_t key = 0;                     // kKey, unless device_key is set
  const int64_t* device_key = nullptr;  // kKey: the key in device memory (CUDA only)
  uint32_t threshold = 0;               // kKey: keep_threshold(p)
};

template <class T>
struct BiasReluDropoutBackward {
  const T* grad = nullptr;  // (rows, width)
  const T* y = nullptr;     // (rows, width)
  T* dx = nullptr;          // (rows, width)
  T* dbias = nullptr;       // (groups, width)
  int64_t rows = 0;         // of all groups
  int64_t width = 0;
  int64_t groups = 1;
  double scale = 1;  // 1 / (1 - p)
};

}  // namespace ntkcl::kernels
