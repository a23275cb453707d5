#include "ntkcl/kernels/resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace ntkcl::kernels {
namespace {

// 8 bits of a pixel and 2 of headroom for negative lobes leave 22 for the fraction of a weight.
constexpr int kFractionBits = 32 - 8 - 2;
constexpr int32_t kHalf = 1 << (kFractionBits - 1);

double bilinear(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Keys' cubic with a = -0.5.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  }
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

int32_t fixed_point(double weight) {
  const double scaled = weight * (1 << kFractionBits);
  return static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

// The input positions and weights of consecutive output positions of one axis.
struct Taps {
  int64_t stride = 0;            // weights reserved per output position
  std::vector<int64_t> first;    // first input position
  std::vector<int64_t> count;    // number of input positions
  std::vector<int32_t> weights;  // (outputs, stride)
};

// Taps of outputs begin .. begin+n-1, of out_size over [low, high) of an axis of in_size.
Taps make_taps(int64_t in_size, float low, float high, int64_t out_size, Filter filter,
               int64_t begin, int64_t n) {
  const double scale = static_cast<double>(high - low) / static_cast<double>(out_size);
  const double filter_scale = std::max(scale, 1.0);
  const double support = (filter == Filter::kBilinear ? 1.0 : 2.0) * filter_scale;
  const double inverse = 1.0 / filter_scale;
  Taps taps;
  taps.stride = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
  taps.first.resize(n);
  taps.count.resize(n);
  taps.weights.resize(n * taps.stride);
  std::vector<double> exact(taps.stride);
  for (int64_t i = 0; i < n; ++i) {
    const double center = low + (static_cast<double>(begin + i) + 0.5) * scale;
    const auto first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const auto last = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in_size);
    double sum = 0.0;
    for (int64_t x = first; x < last; ++x) {
      const double at = (static_cast<double>(x) - center + 0.5) * inverse;
      exact[x - first] = filter == Filter::kBilinear ? bilinear(at) : bicubic(at);
      sum += exact[x - first];
    }
    for (int64_t k = 0; k < last - first; ++k) {
      taps.weights[i * taps.stride + k] = fixed_point(sum != 0.0 ? exact[k] / sum : exact[k]);
    }
    taps.first[i] = first;
    taps.count[i] = last - first;
  }
  return taps;
}

using Int4 = int32_t __attribute__((vector_size(16)));
using Byte4 = uint8_t __attribute__((vector_size(4)));
using Int8 = int32_t __attribute__((vector_size(32)));
using Byte8 = uint8_t __attribute__((vector_size(8)));

#define NTKCL_INLINE [[gnu::always_inline]] inline

NTKCL_INLINE uint8_t to_byte(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kFractionBits, 0, 255));
}

// Columns: `rows` rows of `input` to `output`, contiguous (rows, taps, 3). A pixel is read as four
// bytes, so one byte must be readable behind the last.
template <int kRows>
NTKCL_INLINE void columns_of(const uint8_t* input, int64_t row_bytes, const Taps& taps,
                             uint8_t* output) {
  const auto n = static_cast<int64_t>(taps.first.size());
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* weights = taps.weights.data() + i * taps.stride;
    const uint8_t* pixel = input + 3 * taps.first[i];
    Int4 sums[kRows];
    for (Int4& sum : sums) {
      sum = Int4{kHalf, kHalf, kHalf, kHalf};
    }
    for (int64_t k = 0; k < taps.count[i]; ++k, pixel += 3) {
      for (int r = 0; r < kRows; ++r) {
        Byte4 bytes;
        std::memcpy(&bytes, pixel + r * row_bytes, 4);
        sums[r] += __builtin_convertvector(bytes, Int4) * weights[k];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int channel = 0; channel < 3; ++channel) {
        output[3 * (r * n + i) + channel] = to_byte(sums[r][channel]);
      }
    }
  }
}

NTKCL_INLINE void columns(const ImageView& input, const Taps& taps, uint8_t* output) {
  const auto n = static_cast<int64_t>(taps.first.size());
  const int64_t safe_rows = input.height - 1;  // the last row may end where the memory ends
  int64_t y = 0;
  for (; y + 4 <= safe_rows; y += 4) {
    columns_of<4>(input.pixels + y * input.row_bytes, input.row_bytes, taps, output + 3 * y * n);
  }
  for (; y < safe_rows; ++y) {
    columns_of<1>(input.pixels + y * input.row_bytes, input.row_bytes, taps, output + 3 * y * n);
  }
  const uint8_t* row = input.pixels + y * input.row_bytes;
  std::vector<uint8_t> padded(row, row + 3 * input.width);
  padded.push_back(0);
  columns_of<1>(padded.data(), 0, taps, output + 3 * y * n);
}

// Rows: one output row of `bytes` bytes from the `count` rows at `input`.
NTKCL_INLINE void row_of(const uint8_t* input, int64_t row_bytes, const int32_t* weights,
                         int64_t count, int64_t bytes, uint8_t* output) {
  constexpr int kVectors = 4;
  constexpr int64_t kBlock = 8 * kVectors;
  int64_t x = 0;
  for (; x + kBlock <= bytes; x += kBlock) {
    Int8 sums[kVectors];
    for (Int8& sum : sums) {
      sum = Int8{} + kHalf;
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        Byte8 pixels;
        std::memcpy(&pixels, input + k * row_bytes + x + 8 * v, 8);
        sums[v] += __builtin_convertvector(pixels, Int8) * weights[k];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      Int8 value = sums[v] >> kFractionBits;
      value = value < 0 ? Int8{} : value;
      value = value > 255 ? Int8{} + 255 : value;
      const Byte8 pixels = __builtin_convertvector(value, Byte8);
      std::memcpy(output + x + 8 * v, &pixels, 8);
    }
  }
  for (; x < bytes; ++x) {
    int32_t sum = kHalf;
    for (int64_t k = 0; k < count; ++k) {
      sum += input[k * row_bytes + x] * weights[k];
    }
    output[x] = to_byte(sum);
  }
}

// `input` begins at input row `origin` of the taps.
NTKCL_INLINE void rows(const ImageView& input, int64_t origin, const Taps& taps, uint8_t* output) {
  const int64_t bytes = 3 * input.width;
  for (size_t i = 0; i < taps.first.size(); ++i) {
    row_of(input.pixels + (taps.first[i] - origin) * input.row_bytes, input.row_bytes,
           taps.weights.data() + i * taps.stride, taps.count[i], bytes, output + i * bytes);
  }
}

// The same code for two instruction sets, chosen at run time.
struct Passes {
  void (*columns)(const ImageView&, const Taps&, uint8_t*);
  void (*rows)(const ImageView&, int64_t, const Taps&, uint8_t*);
};

void columns_baseline(const ImageView& input, const Taps& taps, uint8_t* output) {
  columns(input, taps, output);
}
void rows_baseline(const ImageView& input, int64_t origin, const Taps& taps, uint8_t* output) {
  rows(input, origin, taps, output);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void columns_avx2(const ImageView& input, const Taps& taps,
                                          uint8_t* output) {
  columns(input, taps, output);
}
[[gnu::target("avx2")]] void rows_avx2(const ImageView& input, int64_t origin, const Taps& taps,
                                       uint8_t* output) {
  rows(input, origin, taps, output);
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

// Whether an axis only shifts: every weight is then 1 or 0.
bool is_shift(float low, float high, int64_t out_size) {
  return low == std::floor(low) && high - low == static_cast<float>(out_size);
}

void copy_rows(const ImageView& input, uint8_t* output) {
  for (int64_t y = 0; y < input.height; ++y) {
    std::memcpy(output + 3 * y * input.width, input.pixels + y * input.row_bytes, 3 * input.width);
  }
}

}  // namespace

void resample(const ImageView& input, const Box& box, Filter filter, int64_t height, int64_t width,
              const Window& window, uint8_t* output) {
  static const Passes passes = choose_passes();
  if (window.height == 0 || window.width == 0) {
    return;
  }
  const bool shifts_columns = is_shift(box.left, box.right, width);
  const bool shifts_rows = is_shift(box.top, box.bottom, height);

  // The input rows that the window needs.
  Taps vertical;
  int64_t top = static_cast<int64_t>(box.top) + window.top;
  int64_t bottom = top + window.height;
  if (!shifts_rows) {
    vertical =
        make_taps(input.height, box.top, box.bottom, height, filter, window.top, window.height);
    top = vertical.first.front();
    bottom = vertical.first.back() + vertical.count.back();
  }
  ImageView view = input.crop(top, 0, bottom - top, input.width);

  // Columns.
  std::vector<uint8_t> narrowed;
  if (shifts_columns) {
    view = view.crop(0, static_cast<int64_t>(box.left) + window.left, view.height, window.width);
  } else {
    const Taps horizontal =
        make_taps(input.width, box.left, box.right, width, filter, window.left, window.width);
    uint8_t* target = output;
    if (!shifts_rows) {
      narrowed.resize(3 * view.height * window.width);
      target = narrowed.data();
    }
    passes.columns(view, horizontal, target);
    view = {target, view.height, window.width, 3 * window.width};
  }

  // Rows.
  if (!shifts_rows) {
    passes.rows(view, top, vertical, output);
  } else if (shifts_columns) {
    copy_rows(view, output);
  }
}

void resample(const ImageView& input, Filter filter, int64_t height, int64_t width,
              uint8_t* output) {
  const Box box{0, 0, static_cast<float>(input.width), static_cast<float>(input.height)};
  resample(input, box, filter, height, width, {0, 0, height, width}, output);
}

}  // namespace ntkcl::kernels
