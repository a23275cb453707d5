#include <algorithm>

#include "ntkcl/kernels/gelu_cuda.h"
#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/warp.cuh"

// One read of each argument, one write of the result.
namespace ntkcl::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;

__device__ inline float phi(float x) {
  return normcdff(x);
}
__device__ inline double phi(double x) {
  return normcdf(x);
}

// x Phi(x), 0 at minus infinity.
template <class C>
__device__ inline C gelu(C x) {
  const C p = phi(x);
  return p == C{0} ? C{0} : x * p;
}

// Phi(x) + x Phi'(x), the second term 0 at both infinities.
template <class C>
__device__ inline C slope(C x) {
  const C bell = exp(C{-0.5} * x * x);
  return phi(x) + (bell > C{0} ? x * static_cast<C>(kInverseSqrt2Pi) * bell : C{0});
}

template <class T, int kElements>
__global__ void __launch_bounds__(kThreads) forward_kernel(Gelu<T> args) {
  const int64_t stride = int64_t{gridDim.x} * kThreads * kElements;
  Compute<T> values[kElements];
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements; i < args.size;
       i += stride) {
    read<T, kElements>(args.x + i, values);
    for (int j = 0; j < kElements; ++j) {
      values[j] = gelu(values[j]);
    }
    write<T, kElements>(args.y + i, values);
  }
}

template <class T, int kElements>
__global__ void __launch_bounds__(kThreads) backward_kernel(GeluBackward<T> args) {
  const int64_t stride = int64_t{gridDim.x} * kThreads * kElements;
  Compute<T> values[kElements];
  Compute<T> grads[kElements];
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements; i < args.size;
       i += stride) {
    read<T, kElements>(args.x + i, values);
    read<T, kElements>(args.grad + i, grads);
    for (int j = 0; j < kElements; ++j) {
      grads[j] *= slope(values[j]);
    }
    write<T, kElements>(args.dx + i, grads);
  }
}

unsigned block_count(int64_t size, int elements) {
  const int64_t of_block = int64_t{kThreads} * elements;
  return static_cast<unsigned>(std::min((size + of_block - 1) / of_block, kMaxBlocks));
}

}  // namespace

template <class T>
cudaError_t gelu_cuda(const Gelu<T>& args, cudaStream_t stream) {
  const bool vector = args.size % 4 == 0 && is_vec4_aligned(args.x) && is_vec4_aligned(args.y);
  const auto kernel = vector ? forward_kernel<T, 4> : forward_kernel<T, 1>;
  return launch(kernel, block_count(args.size, vector ? 4 : 1), kThreads, stream, args);
}

template <class T>
cudaError_t gelu_backward_cuda(const GeluBackward<T>& args, cudaStream_t stream) {
  const bool vector = args.size % 4 == 0 && is_vec4_aligned(args.grad) && is_vec4_aligned(args.x) &&
                      is_vec4_aligned(args.dx);
  const auto kernel = vector ? backward_kernel<T, 4> : backward_kernel<T, 1>;
  return launch(kernel, block_count(args.size, vector ? 4 : 1), kThreads, stream, args);
}

#define NTKCL_INSTANTIATE(T)                                    \
  template cudaError_t gelu_cuda(const Gelu<T>&, cudaStream_t); \
  template cudaError_t gelu_backward_cuda(const GeluBackward<T>&, cudaStream_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
