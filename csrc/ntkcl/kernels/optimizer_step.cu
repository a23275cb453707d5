#include <new>

#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/optimizer_step_cuda.h"
#include "ntkcl/kernels/tensor_list.cuh"

// One read of each argument, one write of what changes.
namespace ntkcl::kernels {
namespace {

template <class T>
__device__ inline T new_parameter(const StepTensor<T>& tensor, const SgdStep<T>& s, T parameter,
                                  T gradient, int64_t i) {
  if (tensor.first != nullptr) {
    gradient = std::fma(tensor.first[i], s.momentum, gradient);
    tensor.first[i] = gradient;
  }
  return std::fma(-s.lr, gradient, parameter);
}

template <class T>
__device__ inline T new_parameter(const StepTensor<T>& tensor, const AdamStep<T>& s, T parameter,
                                  T gradient, int64_t i) {
  const T mean = moved_mean(s, tensor.first[i], gradient);
  const T square = moved_square(s, tensor.second[i], gradient);
  tensor.first[i] = mean;
  tensor.second[i] = square;
  return adam_parameter(s, s.shrink * parameter, mean, square);
}

template <class T, class Step>
__device__ inline void sweep(const StepTensor<T>& tensor, const Step& step, double* distances) {
  double distance = 0;
  for_each_element(tensor.size, [&](int64_t i) {
    const T before = tensor.parameter[i];
    const T moved = tensor.anchor == nullptr ? T{0} : before - tensor.anchor[i];
    distance += static_cast<double>(moved) * static_cast<double>(moved);
    const T gradient = regularized(step.regularizer, tensor.gradient[i], before, moved);
    const T after = new_parameter(tensor, step, before, gradient, i);
    tensor.parameter[i] = after;
    if (tensor.average != nullptr) {
      tensor.average[i] = averaged(step.regularizer, tensor.average[i], after);
    }
  });
  distance = block_sum(distance);
  if (threadIdx.x == 0) {
    distances[int64_t{blockIdx.z} * gridDim.x + blockIdx.x] = distance;
  }
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads)
    sgd_kernel(TensorPack<StepTensor<T>> pack, SgdStep<T> step, double* distances) {
  sweep(pack.tensors[blockIdx.z], step, distances);
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads)
    adam_kernel(TensorPack<StepTensor<T>> pack, AdamOptions options, const float* steps,
                double* distances) {
  alignas(AdamStep<T>) __shared__ unsigned char memory[sizeof(AdamStep<T>)];
  if (threadIdx.x == 0) {
    new (memory) AdamStep<T>(options, *steps);  // powers, once a block
  }
  __syncthreads();
  sweep(pack.tensors[blockIdx.z], *reinterpret_cast<const AdamStep<T>*>(memory), distances);
}

}  // namespace

template <class T>
cudaError_t sgd_step_cuda(const StepTensor<T>* tensors, int64_t count, const SgdOptions& options,
                          double* distances, int64_t blocks, cudaStream_t stream) {
  return for_each_pack(tensors, count, [&](const auto& pack, unsigned n, int64_t first) {
    const dim3 grid(static_cast<unsigned>(blocks), 1, n);
    return launch(sgd_kernel<T>, grid, kSweepThreads, stream, pack, SgdStep<T>(options),
                  distances + first * blocks);
  });
}

template <class T>
cudaError_t adam_step_cuda(const StepTensor<T>* tensors, int64_t count, const AdamOptions& options,
                           const float* steps, double* distances, int64_t blocks,
                           cudaStream_t stream) {
  return for_each_pack(tensors, count, [&](const auto& pack, unsigned n, int64_t first) {
    const dim3 grid(static_cast<unsigned>(blocks), 1, n);
    return launch(adam_kernel<T>, grid, kSweepThreads, stream, pack, options, steps,
                  distances + first * blocks);
  });
}

#define NTKCL_INSTANTIATE(T)                                                                    \
  template cudaError_t sgd_step_cuda(const StepTensor<T>*, int64_t, const SgdOptions&, double*, \
                                     int64_t, cudaStream_t);                                    \
  template cudaError_t adam_step_cuda(const StepTensor<T>*, int64_t, const AdamOptions&,        \
                                      const float*, double*, int64_t, cudaStream_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
