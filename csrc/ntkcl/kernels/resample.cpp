#include "ntkcl/kernels/resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ntkcl/kernels/resample_axis.h"

namespace ntkcl::kernels {
namespace {

// What consecutive output positions of one axis read.
struct Axis {
  bool shifts = false;      // every weight would be 1 or 0: output i reads first_input + i alone
  int64_t first_input = 0;  // all inputs that are read: first_input .. first_input+inputs-1
  int64_t inputs = 0;
  int64_t stride = 0;            // weights reserved per output
  std::vector<int64_t> first;    // first input of each output, relative to first_input
  std::vector<int64_t> count;    // number of inputs of each output
  std::vector<int32_t> weights;  // (outputs, stride)
};

// Outputs begin .. begin+n-1.
Axis make_axis(const AxisMap& map, int64_t begin, int64_t n) {
  Axis axis;
  if (map.low == std::floor(map.low) && map.high - map.low == static_cast<float>(map.out_size)) {
    axis.shifts = true;
    axis.first_input = static_cast<int64_t>(map.low) + begin;
    axis.inputs = n;
    return axis;
  }
  axis.stride = map.most_taps();
  axis.first.resize(n);
  axis.count.resize(n);
  axis.weights.resize(n * axis.stride);
  std::vector<double> exact(axis.stride);
  for (int64_t i = 0; i < n; ++i) {
    const Span span =
        write_weights(map, begin + i, exact.data(), axis.weights.data() + i * axis.stride);
    axis.first[i] = span.first;
    axis.count[i] = span.count;
  }
  axis.first_input = axis.first.front();
  axis.inputs = axis.first.back() + axis.count.back() - axis.first_input;
  for (int64_t& first : axis.first) {
    first -= axis.first_input;
  }
  return axis;
}

using Int4 = int32_t __attribute__((vector_size(16)));
using Byte16 = uint8_t __attribute__((vector_size(16)));

#define NTKCL_INLINE [[gnu::always_inline]] inline

// Bytes kFirst .. kFirst+3 as integers. Note: a shuffle, since compilers take
// __builtin_convertvector apart into single elements.
template <int kFirst>
NTKCL_INLINE Int4 widen(Byte16 b) {
  constexpr int i = kFirst;
  return reinterpret_cast<Int4>(__builtin_shufflevector(b, Byte16{}, i, 16, 16, 16, i + 1, 16, 16,
                                                        16, i + 2, 16, 16, 16, i + 3, 16, 16, 16));
}

// Sums to pixel values, one in the low byte of each element.
NTKCL_INLINE Byte16 to_bytes(Int4 sums) {
  Int4 value = sums >> kFractionBits;
  value = value < 0 ? Int4{} : value;
  value = value > 255 ? Int4{} + 255 : value;
  return reinterpret_cast<Byte16>(value);
}

NTKCL_INLINE Byte16 pack(const Int4 (&sums)[4]) {
  const Byte16 low = __builtin_shufflevector(to_bytes(sums[0]), to_bytes(sums[1]), 0, 4, 8, 12, 16,
                                             20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
  const Byte16 high = __builtin_shufflevector(to_bytes(sums[2]), to_bytes(sums[3]), 0, 4, 8, 12, 16,
                                              20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}

// Columns: `rows` rows of `input` to `output`, contiguous (rows, outputs, 3). A pixel is read as
// four bytes, so one byte must be readable behind the last.
template <int kRows>
NTKCL_INLINE void columns_of(const uint8_t* input, int64_t row_bytes, const Axis& axis,
                             uint8_t* output) {
  const auto n = static_cast<int64_t>(axis.first.size());
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* weights = axis.weights.data() + i * axis.stride;
    const int64_t count = axis.count[i];
    const uint8_t* pixel = input + 3 * axis.first[i];
    Int4 sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r] = Int4{} + kHalf;
    }
    for (int64_t k = 0; k < count; ++k, pixel += 3) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t bytes;
        std::memcpy(&bytes, pixel + r * row_bytes, 4);
        sums[r] += widen<0>(reinterpret_cast<Byte16>(Int4{bytes})) * weights[k];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Byte16 bytes = to_bytes(sums[r]);
      uint8_t* target = output + 3 * (r * n + i);
      target[0] = bytes[0];
      target[1] = bytes[4];
      target[2] = bytes[8];
    }
  }
}

NTKCL_INLINE void columns(const ImageView& input, const Axis& axis, uint8_t* output) {
  const auto n = static_cast<int64_t>(axis.first.size());
  const int64_t safe_rows = input.height - 1;  // the last row may end where the memory ends
  int64_t y = 0;
  for (; y + 4 <= safe_rows; y += 4) {
    columns_of<4>(input.pixels + y * input.row_bytes, input.row_bytes, axis, output + 3 * y * n);
  }
  for (; y < safe_rows; ++y) {
    columns_of<1>(input.pixels + y * input.row_bytes, input.row_bytes, axis, output + 3 * y * n);
  }
  const uint8_t* row = input.pixels + y * input.row_bytes;
  std::vector<uint8_t> padded(row, row + 3 * input.width);
  padded.push_back(0);
  columns_of<1>(padded.data(), 0, axis, output + 3 * y * n);
}

// Rows: one output row of `bytes` bytes from the `count` rows at `input`.
NTKCL_INLINE void row_of(const uint8_t* input, int64_t row_bytes, const int32_t* weights,
                         int64_t count, int64_t bytes, uint8_t* output) {
  int64_t x = 0;
  for (; x + 16 <= bytes; x += 16) {
    Int4 sums[4] = {Int4{} + kHalf, Int4{} + kHalf, Int4{} + kHalf, Int4{} + kHalf};
    for (int64_t k = 0; k < count; ++k) {
      Byte16 pixels;
      std::memcpy(&pixels, input + k * row_bytes + x, 16);
      sums[0] += widen<0>(pixels) * weights[k];
      sums[1] += widen<4>(pixels) * weights[k];
      sums[2] += widen<8>(pixels) * weights[k];
      sums[3] += widen<12>(pixels) * weights[k];
    }
    const Byte16 values = pack(sums);
    std::memcpy(output + x, &values, 16);
  }
  for (; x < bytes; ++x) {
    int32_t sum = kHalf;
    for (int64_t k = 0; k < count; ++k) {
      sum += input[k * row_bytes + x] * weights[k];
    }
    output[x] = pixel_of(sum);
  }
}

NTKCL_INLINE void rows(const ImageView& input, const Axis& axis, uint8_t* output) {
  const int64_t bytes = 3 * input.width;
  for (size_t i = 0; i < axis.first.size(); ++i) {
    row_of(input.pixels + axis.first[i] * input.row_bytes, input.row_bytes,
           axis.weights.data() + i * axis.stride, axis.count[i], bytes, output + i * bytes);
  }
}

// The same code for two instruction sets, chosen at run time.
using Pass = void (*)(const ImageView& input, const Axis& axis, uint8_t* output);
struct Passes {
  Pass columns;
  Pass rows;
};

void columns_baseline(const ImageView& input, const Axis& axis, uint8_t* output) {
  columns(input, axis, output);
}
void rows_baseline(const ImageView& input, const Axis& axis, uint8_t* output) {
  rows(input, axis, output);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void columns_avx2(const ImageView& input, const Axis& axis,
                                          uint8_t* output) {
  columns(input, axis, output);
}
[[gnu::target("avx2")]] void rows_avx2(const ImageView& input, const Axis& axis, uint8_t* output) {
  rows(input, axis, output);
}
#endif

Passes choose_passes() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    return {columns_avx2, rows_avx2};
  }
#endif
  return {columns_baseline, rows_baseline};
}

}  // namespace

void resample(const ImageView& input, const Box& box, Filter filter, int64_t height, int64_t width,
              const Window& window, uint8_t* output) {
  static const Passes passes = choose_passes();
  if (window.height == 0 || window.width == 0) {
    return;
  }
  const Axis x =
      make_axis({box.left, box.right, input.width, width, filter}, window.left, window.width);
  const Axis y =
      make_axis({box.top, box.bottom, input.height, height, filter}, window.top, window.height);
  const ImageView view = input.crop(y.first_input, x.first_input, y.inputs, x.inputs);

  // At most one pass.
  if (x.shifts && y.shifts) {
    copy_rows(view, output);
    return;
  }
  if (x.shifts || y.shifts) {
    (x.shifts ? passes.rows : passes.columns)(view, x.shifts ? y : x, output);
    return;
  }

  // Two.
  std::vector<uint8_t> between;
  if (rows_come_first(input.height, input.width, height, width)) {
    between.resize(3 * window.height * view.width);
    passes.rows(view, y, between.data());
    passes.columns({between.data(), window.height, view.width, 3 * view.width}, x, output);
  } else {
    between.resize(3 * view.height * window.width);
    passes.columns(view, x, between.data());
    passes.rows({between.data(), view.height, window.width, 3 * window.width}, y, output);
  }
}

void copy_rows(const ImageView& input, uint8_t* output) {
  for (int64_t y = 0; y < input.height; ++y) {
    std::memcpy(output + 3 * y * input.width, input.pixels + y * input.row_bytes, 3 * input.width);
  }
}

void resample(const ImageView& input, Filter filter, int64_t height, int64_t width,
              uint8_t* output) {
  const Box box{0, 0, static_cast<float>(input.width), static_cast<float>(input.height)};
  resample(input, box, filter, height, width, {0, 0, height, width}, output);
}

}  // namespace ntkcl::kernels
