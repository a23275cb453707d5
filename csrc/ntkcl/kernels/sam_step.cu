#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/sam_step_cuda.h"
#include "ntkcl/kernels/tensor_list.cuh"

// A sweep each: blockIdx.y is the row of a stacked tensor, blockIdx.x the block within it.
namespace ntkcl::kernels {
namespace {

constexpr int64_t kMaxRows = 1024;  // of a grid

// Calls run(i, row) for the elements of the block's rows, and end(row) for all threads after each.
template <class T, class Run, class End>
__device__ inline void over_rows(const SamTensor<T>& tensor, const Run& run, const End& end) {
  const int64_t width = tensor.rows == 0 ? 0 : tensor.size / tensor.rows;
  for (int64_t row = blockIdx.y; row < tensor.rows; row += gridDim.y) {
    for_each_element(width, [&](int64_t i) { run(row * width + i, row); });
    end(row);
  }
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads)
    square_sums_kernel(TensorPack<SamTensor<T>> pack, double* sums) {
  const SamTensor<T>& tensor = pack.tensors[blockIdx.z];
  double sum = 0;
  for_each_element(tensor.size, [&](int64_t i) {
    const double g = tensor.first_gradient[i];
    sum += g * g;
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    sums[int64_t{blockIdx.z} * gridDim.x + blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads)
    ascend_kernel(TensorPack<SamTensor<T>> pack, const double* scale) {
  const SamTensor<T>& tensor = pack.tensors[blockIdx.z];
  const T factor = static_cast<T>(*scale);
  for_each_element(tensor.size, [&](int64_t i) {
    const T before = tensor.parameter[i];
    tensor.saved[i] = before;
    tensor.parameter[i] = std::fma(tensor.first_gradient[i], factor, before);
  });
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads)
    momentum_kernel(TensorPack<SamTensor<T>> pack, T factor, Alignment* sums) {
  const SamTensor<T>& tensor = pack.tensors[blockIdx.z];
  Alignment sum;
  over_rows(
      tensor,
      [&](int64_t i, int64_t) {
        const T moved = moved_momentum(tensor.momentum[i], factor, tensor.saved[i], tensor.decay,
                                       tensor.gradient[i]);
        tensor.momentum[i] = moved;
        if (sums != nullptr) {
          const double v = moved, g = tensor.first_gradient[i];
          sum += {v * g, v * v, g * g};
        }
      },
      [&](int64_t row) {
        if (sums == nullptr) {
          return;
        }
        const Alignment all{block_sum(sum.product), block_sum(sum.momentum_square),
                            block_sum(sum.gradient_square)};
        if (threadIdx.x == 0) {
          sums[(tensor.first_row + row) * gridDim.x + blockIdx.x] = all;
        }
        sum = {};
      });
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads)
    descend_kernel(TensorPack<SamTensor<T>> pack, const T* gammas) {
  const SamTensor<T>& tensor = pack.tensors[blockIdx.z];
  over_rows(
      tensor,
      [&](int64_t i, int64_t row) {
        const T factor = -tensor.lr * gammas[tensor.first_row + row];
        tensor.parameter[i] = std::fma(factor, tensor.momentum[i], tensor.saved[i]);
      },
      [](int64_t) {});
}

template <class T>
unsigned most_rows(const SamTensor<T>* tensors, int64_t count) {
  int64_t rows = 1;
  for (int64_t i = 0; i < count; ++i) {
    rows = std::max(rows, tensors[i].rows);
  }
  return static_cast<unsigned>(std::min(rows, kMaxRows));
}

}  // namespace

template <class T>
cudaError_t sam_square_sums_cuda(const SamTensor<T>* tensors, int64_t count, double* sums,
                                 int64_t blocks, cudaStream_t stream) {
  return for_each_pack(tensors, count, [&](const auto& pack, unsigned n, int64_t first) {
    const dim3 grid(static_cast<unsigned>(blocks), 1, n);
    return launch(square_sums_kernel<T>, grid, kSweepThreads, stream, pack, sums + first * blocks);
  });
}

template <class T>
cudaError_t sam_ascend_cuda(const SamTensor<T>* tensors, int64_t count, const double* scale,
                            int64_t blocks, cudaStream_t stream) {
  return for_each_pack(tensors, count, [&](const auto& pack, unsigned n, int64_t) {
    const dim3 grid(static_cast<unsigned>(blocks), 1, n);
    return launch(ascend_kernel<T>, grid, kSweepThreads, stream, pack, scale);
  });
}

template <class T>
cudaError_t sam_momentum_cuda(const SamTensor<T>* tensors, int64_t count, T factor, Alignment* sums,
                              int64_t blocks, cudaStream_t stream) {
  const unsigned rows = most_rows(tensors, count);
  return for_each_pack(tensors, count, [&](const auto& pack, unsigned n, int64_t) {
    const dim3 grid(static_cast<unsigned>(blocks), rows, n);
    return launch(momentum_kernel<T>, grid, kSweepThreads, stream, pack, factor, sums);
  });
}

template <class T>
cudaError_t sam_descend_cuda(const SamTensor<T>* tensors, int64_t count, const T* gammas,
                             int64_t blocks, cudaStream_t stream) {
  const unsigned rows = most_rows(tensors, count);
  return for_each_pack(tensors, count, [&](const auto& pack, unsigned n, int64_t) {
    const dim3 grid(static_cast<unsigned>(blocks), rows, n);
    return launch(descend_kernel<T>, grid, kSweepThreads, stream, pack, gammas);
  });
}

#define NTKCL_INSTANTIATE(T)                                                                   \
  template cudaError_t sam_square_sums_cuda(const SamTensor<T>*, int64_t, double*, int64_t,    \
                                            cudaStream_t);                                     \
  template cudaError_t sam_ascend_cuda(const SamTensor<T>*, int64_t, const double*, int64_t,   \
                                       cudaStream_t);                                          \
  template cudaError_t sam_momentum_cuda(const SamTensor<T>*, int64_t, T, Alignment*, int64_t, \
                                         cudaStream_t);                                        \
  template cudaError_t sam_descend_cuda(const SamTensor<T>*, int64_t, const T*, int64_t,       \
                                        cudaStream_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
