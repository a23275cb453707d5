#include <cuda_fp8.h>

#include <algorithm>

#include "ntkcl/kernels/float8_rows_cuda.h"
#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/warp.cuh"

// A warp for each row, which it reads twice, the second time from the cache: 2 or 4 bytes an
// element in, 1 out.
namespace ntkcl::kernels {
namespace {

constexpr int kRowsOfBlock = 4;
constexpr int64_t kMaxBlocks = 65536;

__device__ inline float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  }
  return value;
}

template <int kElements>
__device__ inline void write_float8(uint8_t* p, const float (&values)[kElements]) {
  uint8_t bits[kElements];
  for (int j = 0; j < kElements; ++j) {
    bits[j] = __nv_cvt_float_to_fp8(values[j], __NV_SATFINITE, __NV_E4M3);
  }
  if constexpr (kElements == 4) {
    *reinterpret_cast<uchar4*>(p) = make_uchar4(bits[0], bits[1], bits[2], bits[3]);
  } else {
    *p = bits[0];
  }
}

template <class T, int kElements>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock) float8_rows_kernel(Float8Rows<T> args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / kWarp;
  for (int64_t row = first; row < args.rows; row += int64_t{gridDim.x} * kRowsOfBlock) {
    const T* x = args.x + row * args.width;  // (width)
    uint8_t* out = args.values + row * args.width;
    float values[kElements];

    // Largest entry.
    float largest = 0.0f;
    for (int64_t i = int64_t{lane} * kElements; i < args.width; i += kWarp * kElements) {
      read<T, kElements>(x + i, values);
      for (int j = 0; j < kElements; ++j) {
        largest = fmaxf(largest, fabsf(values[j]));
      }
    }
    largest = warp_max(largest) / kLargestFloat8;
    const float scale = largest > 0.0f ? largest : 1.0f;

    // Values.
    for (int64_t i = int64_t{lane} * kElements; i < args.width; i += kWarp * kElements) {
      read<T, kElements>(x + i, values);
      for (int j = 0; j < kElements; ++j) {
        values[j] /= scale;
      }
      write_float8<kElements>(out + i, values);
    }
    if (lane == 0) {
      args.scale[row] = scale;
    }
  }
}

}  // namespace

template <class T>
cudaError_t float8_rows_cuda(const Float8Rows<T>& args, cudaStream_t stream) {
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.x) &&
                      reinterpret_cast<uintptr_t>(args.values) % sizeof(uchar4) == 0;
  const auto kernel = vector ? float8_rows_kernel<T, 4> : float8_rows_kernel<T, 1>;
  const int64_t blocks = std::min((args.rows + kRowsOfBlock - 1) / kRowsOfBlock, kMaxBlocks);
  return launch(kernel, static_cast<unsigned>(blocks), kWarp * kRowsOfBlock, stream, args);
}

template cudaError_t float8_rows_cuda(const Float8Rows<float>&, cudaStream_t);
template cudaError_t float8_rows_cuda(const Float8Rows<BFloat16>&, cudaStream_t);

}  // namespace ntkcl::kernels
