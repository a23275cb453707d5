#include <algorithm>

#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/view_batch_cuda.h"

// A thread for each place of a step, an image for each second side of the grid. Compiled without
// fused multiply-adds, so that weights have the host's bits.
namespace ntkcl::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;  // of an image

// Calls fill(i) for i = 0 .. n-1, over the threads of an image's blocks.
template <class Fill>
__device__ inline void for_each_place(int64_t n, Fill fill) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = first; i < n; i += int64_t{gridDim.x} * kThreads) {
    fill(i);
  }
}

__global__ void __launch_bounds__(kThreads) weights_kernel(ViewBatch batch) {
  for_each_place(2 * batch.size, [&](int64_t i) {
    fill_weights(batch, blockIdx.y, i / batch.size, i % batch.size);
  });
}

__global__ void __launch_bounds__(kThreads) between_kernel(ViewBatch batch) {
  for_each_place(batch.jobs[blockIdx.y].between_pixels(batch.size),
                 [&](int64_t i) { fill_between(batch, blockIdx.y, i); });
}

__global__ void __launch_bounds__(kThreads) out_kernel(ViewBatch batch) {
  for_each_place(batch.size * batch.size, [&](int64_t i) { fill_out(batch, blockIdx.y, i); });
}

dim3 grid_of(const ViewBatch& batch, int64_t places) {
  const int64_t blocks = std::clamp<int64_t>((places + kThreads - 1) / kThreads, 1, kMaxBlocks);
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(batch.images)};
}

}  // namespace

cudaError_t fill_views_cuda(const ViewBatch& batch, cudaStream_t stream) {
  const auto start = [&](void (*kernel)(ViewBatch), int64_t places) {
    return launch(kernel, grid_of(batch, places), kThreads, stream, batch);
  };
  cudaError_t error = start(weights_kernel, 2 * batch.size);
  if (error == cudaSuccess) {
    error = start(between_kernel, batch.most_between);
  }
  return error == cudaSuccess ? start(out_kernel, batch.size * batch.size) : error;
}

}  // namespace ntkcl::kernels
