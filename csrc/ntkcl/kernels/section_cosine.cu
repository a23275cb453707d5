#include <algorithm>

#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/section_cosine_cuda.h"
#include "ntkcl/kernels/warp.cuh"

// One warp per segment, two passes over it, the second one in cache. Normalise: one read of x, one
// write. Project: one read of x and of pulled, one write.
namespace ntkcl::kernels {
namespace {

constexpr int kWarps = 8;  // per block
constexpr int64_t kMaxBlocks = 65536;

template <class T, int kElements>
__global__ void __launch_bounds__(kWarp* kWarps) normalize_kernel(NormalizeSections<T> args) {
  using C = Compute<T>;
  const int lane = threadIdx.x;
  const int64_t segments = args.rows * args.sections;
  for (int64_t segment = int64_t{blockIdx.x} * kWarps + threadIdx.y; segment < segments;
       segment += int64_t{gridDim.x} * kWarps) {
    const T* x = args.x + segment * args.width;
    T* unit = args.unit + segment * args.width;
    C values[kElements];

    // Norm.
    C square = 0;
    for (int64_t c = lane * kElements; c < args.width; c += kWarp * kElements) {
      read<T, kElements>(x + c, values);
      for (int j = 0; j < kElements; ++j) {
        square += values[j] * values[j];
      }
    }
    const C norm = sqrt(warp_sum(square));
    const C length = norm < static_cast<C>(kMinimumNorm) ? static_cast<C>(kMinimumNorm) : norm;
    const C weight = args.weights == nullptr ? C{1} : load(args.weights[segment % args.sections]);
    const C factor = weight / length;

    // Unit vector.
    for (int64_t c = lane * kElements; c < args.width; c += kWarp * kElements) {
      read<T, kElements>(x + c, values);
      for (int j = 0; j < kElements; ++j) {
        values[j] *= factor;
      }
      write<T, kElements>(unit + c, values);
    }
  }
}

template <class T, int kElements>
__global__ void __launch_bounds__(kWarp* kWarps) project_kernel(ProjectSections<T> args) {
  using C = Compute<T>;
  const int lane = threadIdx.x;
  const int64_t segments = args.rows * args.sections;
  for (int64_t segment = int64_t{blockIdx.x} * kWarps + threadIdx.y; segment < segments;
       segment += int64_t{gridDim.x} * kWarps) {
    const T* x = args.x + segment * args.width;
    const T* pulled = args.pulled + segment * args.width;
    T* dx = args.dx + segment * args.width;
    C values[kElements];
    C pulls[kElements];

    // Norm, and the share of the gradient along x.
    C square = 0;
    C dot = 0;
    for (int64_t c = lane * kElements; c < args.width; c += kWarp * kElements) {
      read<T, kElements>(x + c, values);
      read<T, kElements>(pulled + c, pulls);
      for (int j = 0; j < kElements; ++j) {
        square += values[j] * values[j];
        dot += pulls[j] * values[j];
      }
    }
    const C norm = sqrt(warp_sum(square));
    const bool is_short = norm < static_cast<C>(kMinimumNorm);
    const C length = is_short ? static_cast<C>(kMinimumNorm) : norm;
    const C along = warp_sum(dot) / length;
    if (lane == 0) {
      args.along[segment] = along;
    }
    const C share = is_short ? C{0} : along / length;
    const C factor = load(args.weights[segment % args.sections]) / length;

    // Gradient across x.
    for (int64_t c = lane * kElements; c < args.width; c += kWarp * kElements) {
      read<T, kElements>(x + c, values);
      read<T, kElements>(pulled + c, pulls);
      for (int j = 0; j < kElements; ++j) {
        values[j] = factor * (pulls[j] - share * values[j]);
      }
      write<T, kElements>(dx + c, values);
    }
  }
}

unsigned block_count(int64_t segments) {
  return static_cast<unsigned>(std::min((segments + kWarps - 1) / kWarps, kMaxBlocks));
}

}  // namespace

template <class T>
cudaError_t normalize_sections_cuda(const NormalizeSections<T>& args, cudaStream_t stream) {
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.x) && is_vec4_aligned(args.unit);
  const auto kernel = vector ? normalize_kernel<T, 4> : normalize_kernel<T, 1>;
  return launch(kernel, block_count(args.rows * args.sections), dim3(kWarp, kWarps), stream, args);
}

template <class T>
cudaError_t project_sections_cuda(const ProjectSections<T>& args, cudaStream_t stream) {
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.x) &&
                      is_vec4_aligned(args.pulled) && is_vec4_aligned(args.dx);
  const auto kernel = vector ? project_kernel<T, 4> : project_kernel<T, 1>;
  return launch(kernel, block_count(args.rows * args.sections), dim3(kWarp, kWarps), stream, args);
}

#define NTKCL_INSTANTIATE(T)                                                               \
  template cudaError_t normalize_sections_cuda(const NormalizeSections<T>&, cudaStream_t); \
  template cudaError_t project_sections_cuda(const ProjectSections<T>&, cudaStream_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
