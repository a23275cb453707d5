#include <algorithm>

#include "ntkcl/kernels/keep.h"
#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/philox_keep_mask_cuda.h"
#include "ntkcl/kernels/vec4.cuh"

// One byte written per element; bound by the arithmetic, about 25 integer operations an element.
namespace ntkcl::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

// A thread draws four elements at a time.
__global__ void __launch_bounds__(kThreads)
    philox_keep_mask_kernel(const int64_t* device_key, uint32_t threshold, int64_t n,
                            uint8_t* keep) {
  const uint64_t key = static_cast<uint64_t>(*device_key);
  const int64_t groups = (n + 3) / 4;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x; group < groups;
       group += stride) {
    const Philox4 bits = philox(key, group);
    Vec4<uint8_t> kept;
    for (int j = 0; j < 4; ++j) {
      kept.v[j] = is_kept(bits.v[j], threshold);
    }
    const int64_t i = 4 * group;
    if (i + 4 <= n) {
      store4(keep + i, kept);
    } else {
      for (int j = 0; j < 4; ++j) {
        if (i + j < n) {
          keep[i + j] = kept.v[j];
        }
      }
    }
  }
}

}  // namespace

cudaError_t philox_keep_mask_cuda(const int64_t* device_key, uint32_t threshold, int64_t n,
                                  uint8_t* keep, cudaStream_t stream) {
  const int64_t groups = (n + 3) / 4;
  const int64_t blocks = std::min((groups + kThreads - 1) / kThreads, kMaxBlocks);
  return launch(philox_keep_mask_kernel, static_cast<unsigned>(blocks), kThreads, stream,
                device_key, threshold, n, keep);
}

}  // namespace ntkcl::kernels
