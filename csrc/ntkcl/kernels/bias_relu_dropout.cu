#include <algorithm>

#include "ntkcl/kernels/bias_relu_dropout_cuda.h"
#include "ntkcl/kernels/keep.h"
#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/vec4.cuh"

// Forward: one read of x, one write of y; with a mask one byte more per element, with a key about
// 25 integer operations more. Backward: two reads, one write, and a partial sum per chunk of rows.
namespace ntkcl::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

// v <= 0 is false for NaN, so NaN goes through as it does through relu.
template <class C>
__device__ inline C relu(C v) {
  return v <= C{0} ? C{0} : v;
}

// A thread takes four elements at a time, as one Philox counter gives four draws. kVector: width
// is a multiple of 4 and all pointers are aligned for Vec4.
template <class T, Dropout kDropout, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(BiasReluDropout<T> args, int64_t column_step) {
  using C = Compute<T>;
  const int64_t n = args.rows * args.width, of_group = n / args.groups;
  const int64_t stride = 4 * int64_t{gridDim.x} * kThreads;
  const C scale = static_cast<C>(args.scale);
  uint64_t key = args.key;
  if (kDropout == Dropout::kKey && args.device_key != nullptr) {
    key = static_cast<uint64_t>(*args.device_key);
  }

  int64_t i = 4 * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  int64_t column = i % args.width;
  for (; i < n; i += stride) {
    // Which of the four are kept.
    bool kept[4] = {true, true, true, true};
    if constexpr (kDropout == Dropout::kKey) {
      const Philox4 bits = philox(key, static_cast<uint64_t>(i) / 4);
      for (int j = 0; j < 4; ++j) {
        kept[j] = is_kept(bits.v[j], args.threshold);
      }
    } else if constexpr (kDropout == Dropout::kMask && kVector) {
      const Vec4<uint8_t> mask = load4(args.mask + i);
      for (int j = 0; j < 4; ++j) {
        kept[j] = mask.v[j] != 0;
      }
    } else if constexpr (kDropout == Dropout::kMask) {
      for (int j = 0; j < 4 && i + j < n; ++j) {
        kept[j] = args.mask[i + j] != 0;
      }
    }

    // Bias, relu, scale.
    if constexpr (kVector) {
      const Vec4<T> x = load4(args.x + i);
      const int64_t group = args.groups == 1 ? 0 : i / of_group;
      const Vec4<T> bias = load4(args.bias + group * args.width + column);
      Vec4<T> y;
      for (int j = 0; j < 4; ++j) {
        const C v = relu(load(x.v[j]) + load(bias.v[j])) * scale;
        y.v[j] = store<T>(kept[j] ? v : C{0});
      }
      store4(args.y + i, y);
    } else {
      for (int j = 0; j < 4 && i + j < n; ++j) {
        const int64_t group = args.groups == 1 ? 0 : (i + j) / of_group;
        const T bias = args.bias[group * args.width + (column + j) % args.width];
        const C v = relu(load(args.x[i + j]) + load(bias)) * scale;
        args.y[i + j] = store<T>(kept[j] ? v : C{0});
      }
    }

    column += column_step;
    if (column >= args.width) {
      column -= args.width;
    }
  }
}

template <class T, Dropout kDropout>
cudaError_t launch_forward(const BiasReluDropout<T>& args, cudaStream_t stream) {
  const int64_t groups = (args.rows * args.width + 3) / 4;
  const int64_t blocks = std::min((groups + kThreads - 1) / kThreads, kMaxBlocks);
  const int64_t column_step = 4 * blocks * kThreads % args.width;
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.x) &&
                      is_vec4_aligned(args.bias) && is_vec4_aligned(args.y) &&
                      is_vec4_aligned(args.mask);
  const auto kernel =
      vector ? forward_kernel<T, kDropout, true> : forward_kernel<T, kDropout, false>;
  return launch(kernel, static_cast<unsigned>(blocks), kThreads, stream, args, column_step);
}

// How the backward pass lies over the matrix: a block is `lanes` wide, each lane `elements`
// columns, and kThreads / lanes rows high; blocks (tiles of columns, chunks of rows, groups).
constexpr int kMaxLanes = 32;
constexpr int64_t kMaxChunks = 512;
constexpr int64_t kRowsPerThread = 4;

int backward_lanes(int64_t width, int elements) {
  int lanes = 1;
  while (lanes < kMaxLanes && lanes * elements < width) {
    lanes *= 2;
  }
  return lanes;
}

// dx, and its column sums over this block's chunk of rows.
template <class T, int kElements>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(BiasReluDropoutBackward<T> args, int64_t chunk_rows,
                    Compute<T>* __restrict__ workspace) {
  using C = Compute<T>;
  __shared__ C sums[kThreads * kElements];
  const C scale = static_cast<C>(args.scale);
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kElements;
  const int64_t group_rows = args.rows / args.groups, group_row = blockIdx.z * group_rows;
  const int64_t first_row = group_row + int64_t{blockIdx.y} * chunk_rows;
  const int64_t last_row = min(first_row + chunk_rows, group_row + group_rows);

  C sum[kElements] = {};
  if (column < args.width) {
    for (int64_t row = first_row + threadIdx.y; row < last_row; row += blockDim.y) {
      const int64_t i = row * args.width + column;
      if constexpr (kElements == 4) {
        const Vec4<T> grad = load4(args.grad + i);
        const Vec4<T> y = load4(args.y + i);
        Vec4<T> dx;
        for (int j = 0; j < 4; ++j) {
          const C d = load(y.v[j]) <= C{0} ? C{0} : load(grad.v[j]) * scale;
          dx.v[j] = store<T>(d);
          sum[j] += d;
        }
        store4(args.dx + i, dx);
      } else {
        const C d = load(args.y[i]) <= C{0} ? C{0} : load(args.grad[i]) * scale;
        args.dx[i] = store<T>(d);
        sum[0] += d;
      }
    }
  }

  // Sum over the rows of the block, in a fixed order.
  C* mine = sums + (threadIdx.y * blockDim.x + threadIdx.x) * kElements;
  for (int j = 0; j < kElements; ++j) {
    mine[j] = sum[j];
  }
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      for (int j = 0; j < kElements; ++j) {
        mine[j] += mine[half * blockDim.x * kElements + j];
      }
    }
  }
  if (threadIdx.y == 0 && column < args.width) {
    for (int j = 0; j < kElements; ++j) {
      const int64_t chunk = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
      workspace[chunk * args.width + column + j] = mine[j];
    }
  }
}

// dbias from the chunks' sums: a block is kMaxLanes columns wide; blocks (tiles, groups).
template <class T>
__global__ void __launch_bounds__(kThreads)
    dbias_kernel(const Compute<T>* __restrict__ workspace, int64_t chunks, int64_t width,
                 T* __restrict__ dbias) {
  using C = Compute<T>;
  constexpr int kRows = kThreads / kMaxLanes;
  __shared__ C sums[kRows][kMaxLanes];
  const int64_t column = int64_t{blockIdx.x} * kMaxLanes + threadIdx.x;
  C sum = 0;
  if (column < width) {
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kRows) {
      sum += workspace[(blockIdx.y * chunks + chunk) * width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    C total = 0;
    for (int row = 0; row < kRows; ++row) {
      total += sums[row][threadIdx.x];
    }
    dbias[blockIdx.y * width + column] = store<T>(total);
  }
}

template <class T, int kElements>
cudaError_t launch_backward(const BiasReluDropoutBackward<T>& args, Compute<T>* workspace,
                            cudaStream_t stream) {
  const int64_t group_rows = args.rows / args.groups;
  const int64_t chunks = bias_relu_dropout_chunks_cuda(group_rows, args.width);
  const int64_t chunk_rows = (group_rows + chunks - 1) / chunks;
  const auto groups = static_cast<unsigned>(args.groups);
  const int lanes = backward_lanes(args.width, kElements);
  const int64_t tiles = (args.width + lanes * kElements - 1) / (lanes * kElements);
  const cudaError_t error =
      launch(backward_kernel<T, kElements>,
             dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(chunks), groups),
             dim3(lanes, kThreads / lanes), stream, args, chunk_rows, workspace);
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t blocks = (args.width + kMaxLanes - 1) / kMaxLanes;
  return launch(dbias_kernel<T>, dim3(static_cast<unsigned>(blocks), groups),
                dim3(kMaxLanes, kThreads / kMaxLanes), stream, workspace, chunks, args.width,
                args.dbias);
}

}  // namespace

template <class T>
cudaError_t bias_relu_dropout_cuda(const BiasReluDropout<T>& args, cudaStream_t stream) {
  switch (args.dropout) {
    case Dropout::kMask:
      return launch_forward<T, Dropout::kMask>(args, stream);
    case Dropout::kKey:
      return launch_forward<T, Dropout::kKey>(args, stream);
    default:
      return launch_forward<T, Dropout::kNone>(args, stream);
  }
}

int64_t bias_relu_dropout_chunks_cuda(int64_t group_rows, int64_t width) {
  const int64_t block_rows = kThreads / backward_lanes(width, 4) * kRowsPerThread;
  return std::min((group_rows + block_rows - 1) / block_rows, kMaxChunks);
}

template <class T>
cudaError_t bias_relu_dropout_backward_cuda(const BiasReluDropoutBackward<T>& args,
                                            Compute<T>* workspace, cudaStream_t stream) {
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.grad) &&
                      is_vec4_aligned(args.y) && is_vec4_aligned(args.dx);
  return vector ? launch_backward<T, 4>(args, workspace, stream)
                : launch_backward<T, 1>(args, workspace, stream);
}

#define NTKCL_INSTANTIATE(T)                                                              \
  template cudaError_t bias_relu_dropout_cuda(const BiasReluDropout<T>&, cudaStream_t);   \
  template cudaError_t bias_relu_dropout_backward_cuda(const BiasReluDropoutBackward<T>&, \
                                                       Compute<T>*, cudaStream_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
