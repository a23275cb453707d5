#include <algorithm>

#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/tensor_list.cuh"
#include "ntkcl/kernels/view_batch_cuda.h"

// A thread for each place of a step, an image for each second side of the grid. Compiled without
// fused multiply-adds, so that weights have the host's bits.
namespace ntkcl::kernels {
namespace {

constexpr int64_t kMaxBlocks = 4096;  // of an image

__global__ void __launch_bounds__(kSweepThreads) weights_kernel(ViewBatch batch) {
  for_each_element(2 * batch.size, [&](int64_t i) {
    fill_weights(batch, blockIdx.y, i / batch.size, i % batch.size);
  });
}

__global__ void __launch_bounds__(kSweepThreads) between_kernel(ViewBatch batch) {
  for_each_element(batch.jobs[blockIdx.y].between_pixels(batch.size),
                   [&](int64_t i) { fill_between(batch, blockIdx.y, i); });
}

__global__ void __launch_bounds__(kSweepThreads) out_kernel(ViewBatch batch) {
  for_each_element(batch.size * batch.size, [&](int64_t i) { fill_out(batch, blockIdx.y, i); });
}

dim3 grid_of(const ViewBatch& batch, int64_t places) {
  const int64_t blocks =
      std::clamp<int64_t>((places + kSweepThreads - 1) / kSweepThreads, 1, kMaxBlocks);
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(batch.images)};
}

}  // namespace

cudaError_t fill_views_cuda(const ViewBatch& batch, cudaStream_t stream) {
  const auto start = [&](void (*kernel)(ViewBatch), int64_t places) {
    return launch(kernel, grid_of(batch, places), kSweepThreads, stream, batch);
  };
  cudaError_t error = start(weights_kernel, 2 * batch.size);
  if (error == cudaSuccess) {
    error = start(between_kernel, batch.most_between);
  }
  return error == cudaSuccess ? start(out_kernel, batch.size * batch.size) : error;
}

}  // namespace ntkcl::kernels
