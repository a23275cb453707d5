#pragma once

#include <cuda_runtime_api.h>
#include <math.h>  // functions without std::, as device code calls them

#include <cstdint>
#include <functional>

// What .cu files need to be compiled as C++ and run on the host: the threads of a block are fibers
// that take turns at __syncthreads() and at shuffles. No GPU is needed, and the sanitizers see
// every access to global memory. A thread that ends while others wait is an error, which newer GPUs
// forgive. What cannot be shown is what only hardware has: launch limits, races between blocks, the
// device's own functions; and what no kernel here does: threads that wait at different barriers,
// exceptions.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // of the one thread that runs all fibers
#define __launch_bounds__(...)

namespace cuda_on_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// In which order the warps of a block run between two barriers, and lanes between two shuffles.
// Shared memory holds 0xFF when a block begins. Where a barrier is missing, one of the orders reads
// what is not there yet, or no longer.
enum class Order { kAscending, kDescending };
inline Order order = Order::kAscending;

// Runs `thread` for all threads of all blocks. std::logic_error where some threads of a block, or
// of a warp, wait for others that have ended, or for a value from outside of the warp.
void run(dim3 grid, dim3 block, const std::function<void()>& thread);

void block_barrier();
// The value that the lane `lane ^ mask` of the warp gives; at most 8 bytes.
uint64_t exchange(uint64_t value, int mask);

}  // namespace cuda_on_host

inline cuda_on_host::Index threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline void __syncthreads() {
  cuda_on_host::block_barrier();
}

template <class C>
C __shfl_xor_sync(unsigned, C value, int mask) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(C));
  bits = cuda_on_host::exchange(bits, mask);
  __builtin_memcpy(&value, &bits, sizeof(C));
  return value;
}

inline int64_t min(int64_t a, int64_t b) {
  return b < a ? b : a;
}
inline double normcdf(double x) {
  return 0.5 * erfc(-x * 0.70710678118654752440);
}
inline float normcdff(float x) {
  return static_cast<float>(normcdf(static_cast<double>(x)));
}
