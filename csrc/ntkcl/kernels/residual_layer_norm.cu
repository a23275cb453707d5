#include <algorithm>

#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/residual_layer_norm_cuda.h"
#include "ntkcl/kernels/warp.cuh"

// One warp per row. Forward: one read of x and update, one write of sum and out, and two more reads
// of the sum in cache. Backward: one read of grad, sum and sum_grad, another of the first two in
// cache, one write of the gradient in each type.
namespace ntkcl::kernels {
namespace {

constexpr int kWarps = 8;  // per block
constexpr int64_t kMaxBlocks = 65536;

template <class S, class U, class O, int kElements>
__global__ void __launch_bounds__(kWarp* kWarps) forward_kernel(ResidualLayerNorm<S, U, O> args) {
  using C = Compute<S>;
  const int64_t begin = int64_t{threadIdx.x} * kElements, step = int64_t{kWarp} * kElements;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.y; row < args.rows;
       row += int64_t{gridDim.x} * kWarps) {
    const S* x = args.x + row * args.width;
    C values[kElements];
    C others[kElements];

    // Sum. A lane reads again only what it has written itself.
    if (args.update != nullptr) {
      S* sum = args.sum + row * args.width;
      for (int64_t c = begin; c < args.width; c += step) {
        read<S, kElements>(x + c, values);
        read<U, kElements>(args.update + row * args.width + c, others);
        for (int j = 0; j < kElements; ++j) {
          values[j] += others[j];
        }
        write<S, kElements>(sum + c, values);
      }
      x = sum;
    }

    // Mean and variance, of the sum as it is stored.
    C total = 0;
    for (int64_t c = begin; c < args.width; c += step) {
      read<S, kElements>(x + c, values);
      for (int j = 0; j < kElements; ++j) {
        total += values[j];
      }
    }
    const C mean = warp_sum(total) / static_cast<C>(args.width);
    C squares = 0;
    for (int64_t c = begin; c < args.width; c += step) {
      read<S, kElements>(x + c, values);
      for (int j = 0; j < kElements; ++j) {
        squares += (values[j] - mean) * (values[j] - mean);
      }
    }
    const C variance = warp_sum(squares) / static_cast<C>(args.width);
    const C scale = C{1} / sqrt(variance + static_cast<C>(args.eps));
    if (threadIdx.x == 0) {
      args.mean[row] = mean;
      args.scale[row] = scale;
    }

    // Normalised.
    for (int64_t c = begin; c < args.width; c += step) {
      C biases[kElements];
      read<S, kElements>(x + c, values);
      read<S, kElements>(args.weight + c, others);
      read<S, kElements>(args.bias + c, biases);
      for (int j = 0; j < kElements; ++j) {
        values[j] = (values[j] - mean) * scale * others[j] + biases[j];
      }
      write<O, kElements>(args.out + row * args.width + c, values);
    }
  }
}

template <class S, class U, class O, int kElements>
__global__ void __launch_bounds__(kWarp* kWarps)
    backward_kernel(ResidualLayerNormBackward<S, U, O> args) {
  using C = Compute<S>;
  const int64_t begin = int64_t{threadIdx.x} * kElements, step = int64_t{kWarp} * kElements;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.y; row < args.rows;
       row += int64_t{gridDim.x} * kWarps) {
    const O* grad = args.grad + row * args.width;
    const S* sum = args.sum + row * args.width;
    const C mean = args.mean[row];
    const C scale = args.scale[row];
    C grads[kElements];
    C weights[kElements];
    C units[kElements];

    // Means of g = grad * weight and of g u, u = (sum - mean) * scale.
    C total_g = 0;
    C total_gu = 0;
    for (int64_t c = begin; c < args.width; c += step) {
      read<O, kElements>(grad + c, grads);
      read<S, kElements>(args.weight + c, weights);
      read<S, kElements>(sum + c, units);
      for (int j = 0; j < kElements; ++j) {
        const C g = grads[j] * weights[j];
        total_g += g;
        total_gu += g * ((units[j] - mean) * scale);
      }
    }
    const C mean_g = warp_sum(total_g) / static_cast<C>(args.width);
    const C mean_gu = warp_sum(total_gu) / static_cast<C>(args.width);

    // Gradient, in both types.
    for (int64_t c = begin; c < args.width; c += step) {
      read<O, kElements>(grad + c, grads);
      read<S, kElements>(args.weight + c, weights);
      read<S, kElements>(sum + c, units);
      for (int j = 0; j < kElements; ++j) {
        const C u = (units[j] - mean) * scale;
        grads[j] = scale * (grads[j] * weights[j] - mean_g - u * mean_gu);
      }
      if (args.sum_grad != nullptr) {
        read<S, kElements>(args.sum_grad + row * args.width + c, units);
        for (int j = 0; j < kElements; ++j) {
          grads[j] += units[j];
        }
      }
      write<S, kElements>(args.dx + row * args.width + c, grads);
      if (args.dupdate != nullptr) {
        write<U, kElements>(args.dupdate + row * args.width + c, grads);
      }
    }
  }
}

unsigned block_count(int64_t rows) {
  return static_cast<unsigned>(std::min((rows + kWarps - 1) / kWarps, kMaxBlocks));
}

}  // namespace

template <class S, class U, class O>
cudaError_t residual_layer_norm_cuda(const ResidualLayerNorm<S, U, O>& args, cudaStream_t stream) {
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.x) &&
                      is_vec4_aligned(args.update) && is_vec4_aligned(args.weight) &&
                      is_vec4_aligned(args.bias) && is_vec4_aligned(args.sum) &&
                      is_vec4_aligned(args.out);
  const auto kernel = vector ? forward_kernel<S, U, O, 4> : forward_kernel<S, U, O, 1>;
  return launch(kernel, block_count(args.rows), dim3(kWarp, kWarps), stream, args);
}

template <class S, class U, class O>
cudaError_t residual_layer_norm_backward_cuda(const ResidualLayerNormBackward<S, U, O>& args,
                                              cudaStream_t stream) {
  const bool vector = args.width % 4 == 0 && is_vec4_aligned(args.grad) &&
                      is_vec4_aligned(args.sum_grad) && is_vec4_aligned(args.sum) &&
                      is_vec4_aligned(args.weight) && is_vec4_aligned(args.dx) &&
                      is_vec4_aligned(args.dupdate);
  const auto kernel = vector ? backward_kernel<S, U, O, 4> : backward_kernel<S, U, O, 1>;
  return launch(kernel, block_count(args.rows), dim3(kWarp, kWarps), stream, args);
}

#define NTKCL_INSTANTIATE(S, U, O)                                                                \
  template cudaError_t residual_layer_norm_cuda(const ResidualLayerNorm<S, U, O>&, cudaStream_t); \
  template cudaError_t residual_layer_norm_backward_cuda(                                         \
      const ResidualLayerNormBackward<S, U, O>&, cudaStream_t);
NTKCL_FOR_LAYER_NORM_TYPES(NTKCL_INSTANTIATE)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
