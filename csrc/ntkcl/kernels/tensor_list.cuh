#pragma once

#include <algorithm>
#include <cstdint>

#include "ntkcl/kernels/warp.cuh"

// Sweeps over a list of tensors: blockIdx.z is the tensor, and a launch takes as many as fit into a
// kernel's arguments.
namespace ntkcl::kernels {

constexpr int kSweepThreads = 256;

template <class Tensor>
struct TensorPack {
  static constexpr int64_t kCapacity = 3584 / sizeof(Tensor);  // arguments may have 4096 bytes
  Tensor tensors[kCapacity];
};

// Calls start(pack, count, first) for all tensors, `first` the first one of the pack.
template <class Tensor, class Start>
cudaError_t for_each_pack(const Tensor* tensors, int64_t count, const Start& start) {
  using Pack = TensorPack<Tensor>;
  for (int64_t first = 0; first < count; first += Pack::kCapacity) {
    const int64_t n = std::min(Pack::kCapacity, count - first);
    Pack pack;
    std::copy_n(tensors + first, n, pack.tensors);
    const cudaError_t error = start(pack, static_cast<unsigned>(n), first);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

// Calls run(i) for 0 <= i < n, over all threads of blockIdx.x.
template <class Run>
__device__ inline void for_each_element(int64_t n, const Run& run) {
  const int64_t stride = int64_t{gridDim.x} * kSweepThreads;
  for (int64_t i = int64_t{blockIdx.x} * kSweepThreads + threadIdx.x; i < n; i += stride) {
    run(i);
  }
}

// The sum over a block of kSweepThreads, in a fixed order; thread 0 gets it. Every thread calls it.
__device__ inline double block_sum(double value) {
  constexpr int kWarps = kSweepThreads / kWarp;
  __shared__ double partial[kWarps];
  value = warp_sum(value);
  __syncthreads();  // those of the sum before have been read
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += partial[warp];
    }
  }
  return sum;
}

}  // namespace ntkcl::kernels
