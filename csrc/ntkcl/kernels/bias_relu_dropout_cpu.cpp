#include "ntkcl/kernels/bias_relu_dropout_cpu.h"

#include <algorithm>

#include "ntkcl/kernels/multiversion.h"

// Per element one read of x, one write of y and, with a key, a quarter of a Philox draw.
namespace ntkcl::kernels {
namespace {

constexpr int64_t kTile = 256;  // columns whose gradients are summed at a time

// v <= 0 is false for NaN, so NaN goes through as it does through relu.
template <class C>
NTKCL_INLINE C relu(C v) {
  return v <= C{0} ? C{0} : v;
}

template <class T>
NTKCL_INLINE void forward_loop(const T* __restrict__ x, const T* __restrict__ bias,
                               T* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = store<T>(relu(load(x[i]) + load(bias[i])));
  }
}

template <class T>
NTKCL_INLINE void forward_loop(const T* __restrict__ x, const T* __restrict__ bias,
                               const uint8_t* __restrict__ keep, Compute<T> scale,
                               T* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> v = relu(load(x[i]) + load(bias[i])) * scale;
    y[i] = store<T>(keep[i] != 0 ? v : Compute<T>{0});
  }
}

template <class T>
NTKCL_INLINE void backward_loop(const T* __restrict__ grad, const T* __restrict__ y,
                                Compute<T> scale, T* __restrict__ dx, Compute<T>* __restrict__ sums,
                                int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> scaled = load(grad[i]) * scale;
    const Compute<T> d = load(y[i]) <= 0 ? Compute<T>{0} : scaled;
    dx[i] = store<T>(d);
    sums[i] += d;
  }
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(T)                                                                 \
  NTKCL_MULTIVERSION void forward(const T* x, const T* bias, T* y, int64_t n) {        \
    forward_loop<T>(x, bias, y, n);                                                    \
  }                                                                                    \
  NTKCL_MULTIVERSION void forward(const T* x, const T* bias, const uint8_t* keep,      \
                                  Compute<T> scale, T* y, int64_t n) {                 \
    forward_loop<T>(x, bias, keep, scale, y, n);                                       \
  }                                                                                    \
  NTKCL_MULTIVERSION void backward(const T* grad, const T* y, Compute<T> scale, T* dx, \
                                   Compute<T>* sums, int64_t n) {                      \
    backward_loop<T>(grad, y, scale, dx, sums, n);                                     \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
NTKCL_LOOPS(BFloat16)
#undef NTKCL_LOOPS

}  // namespace

template <class T>
void bias_relu_dropout_cpu(const BiasReluDropout<T>& args, int64_t first_block,
                           int64_t last_block) {
  const int64_t total = args.rows * args.width, of_group = total / args.groups;
  const auto scale = static_cast<Compute<T>>(args.scale);

  // A short bias is repeated, so that rows need not be visited one by one.
  T repeated[2 * kKeepBlock];
  const bool narrow = args.width <= kKeepBlock;
  const T* bias = nullptr;
  int64_t group_end = 0;
  const auto enter_group_of = [&](int64_t element) {
    const int64_t group = element / of_group;
    group_end = (group + 1) * of_group;
    bias = args.bias + group * args.width;
    if (narrow) {
      for (int64_t i = 0; i < 2 * kKeepBlock; ++i) {
        repeated[i] = bias[i % args.width];
      }
      bias = repeated;
    }
  };

  alignas(64) uint8_t drawn[kKeepBlock];
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kKeepBlock;
    const int64_t end = std::min(begin + kKeepBlock, total);
    const uint8_t* keep = nullptr;
    if (args.dropout == Dropout::kKey) {
      philox_keep_block(args.key, args.threshold, block, drawn);
      keep = drawn;
    } else if (args.dropout == Dropout::kMask) {
      keep = args.mask + begin;
    }
    for (int64_t i = begin; i < end;) {
      if (i >= group_end) {
        enter_group_of(i);
      }
      const int64_t column = i % args.width, left = std::min(end, group_end) - i;
      const int64_t n = narrow ? left : std::min(left, args.width - column);
      if (keep == nullptr) {
        forward(args.x + i, bias + column, args.y + i, n);
      } else {
        forward(args.x + i, bias + column, keep + (i - begin), scale, args.y + i, n);
      }
      i += n;
    }
  }
}

namespace {

int64_t chunk_rows(int64_t width) {
  return std::max<int64_t>(64, 32768 / std::max<int64_t>(width, 1));
}

}  // namespace

int64_t bias_relu_dropout_chunks_cpu(int64_t group_rows, int64_t width) {
  return (group_rows + chunk_rows(width) - 1) / chunk_rows(width);
}

// The chunk is read as lines: several short rows make a line, a long row is cut into tiles. Up to
// 256 terms are added in the type of the arithmetic, all else in double.
template <class T>
void bias_relu_dropout_backward_cpu(const BiasReluDropoutBackward<T>& args, int64_t chunk,
                                    double* partial) {
  const auto scale = static_cast<Compute<T>>(args.scale);
  const int64_t group_rows = args.rows / args.groups;
  const int64_t chunks = bias_relu_dropout_chunks_cpu(group_rows, args.width);
  const int64_t first_row = chunk % chunks * chunk_rows(args.width);
  const int64_t rows = std::min(chunk_rows(args.width), group_rows - first_row);
  const int64_t begin = (chunk / chunks * group_rows + first_row) * args.width;
  const int64_t end = begin + rows * args.width;
  const int64_t line = args.width * std::max<int64_t>(1, kTile / args.width);

  std::fill_n(partial, args.width, 0.0);
  for (int64_t tile = 0; tile < line; tile += kTile) {
    Compute<T> sums[kTile] = {};
    for (int64_t i = begin + tile; i < end; i += line) {
      const int64_t n = std::min({kTile, line - tile, end - i});
      backward(args.grad + i, args.y + i, scale, args.dx + i, sums, n);
    }
    for (int64_t i = 0; i < std::min(kTile, line - tile); ++i) {
      partial[(tile + i) % args.width] += static_cast<double>(sums[i]);
    }
  }
}

template <class T>
void bias_relu_dropout_dbias_cpu(const BiasReluDropoutBackward<T>& args, const double* partials,
                                 int64_t chunks) {
  for (int64_t i = 0; i < args.groups * args.width; ++i) {
    const double* partial = partials + i / args.width * chunks * args.width + i % args.width;
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += partial[chunk * args.width];
    }
    args.dbias[i] = store<T>(static_cast<Compute<T>>(sum));
  }
}

#define NTKCL_INSTANTIATE(T)                                                                  \
  template void bias_relu_dropout_cpu(const BiasReluDropout<T>&, int64_t, int64_t);           \
  template void bias_relu_dropout_backward_cpu(const BiasReluDropoutBackward<T>&, int64_t,    \
                                               double*);                                      \
  template void bias_relu_dropout_dbias_cpu(const BiasReluDropoutBackward<T>&, const double*, \
                                            int64_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
