#include "ntkcl/kernels/residual_layer_norm_cpu.h"

#include <cmath>

#include "ntkcl/kernels/lanes.h"

// Row by row, each in the first-level cache: forward one read of x and of update, one write of sum
// and of out; backward one read of three matrices, one write of the gradient in each type.
namespace ntkcl::kernels {
namespace {

template <class S, class U, class O>
NTKCL_INLINE void forward_rows(const ResidualLayerNorm<S, U, O>& args, int64_t first,
                               int64_t last) {
  using C = Compute<S>;
  const int64_t n = args.width;
  for (int64_t row = first; row < last; ++row) {
    const S* x = args.x + row * n;
    if (args.update) {
      const U* __restrict__ update = args.update + row * n;
      S* __restrict__ sum = args.sum + row * n;
      for (int64_t i = 0; i < n; ++i) {
        sum[i] = store<S>(load(x[i]) + load(update[i]));
      }
      x = sum;
    }

    // Mean and variance, of the sum as it is stored.
    const C mean = sum_loop<C>(n, [&](int64_t i) NTKCL_INLINE_LAMBDA { return load(x[i]); }) / n;
    const C variance = sum_loop<C>(n,
                                   [&](int64_t i) NTKCL_INLINE_LAMBDA {
                                     const C centred = load(x[i]) - mean;
                                     return centred * centred;
                                   }) /
                       n;
    const C scale = C{1} / std::sqrt(variance + static_cast<C>(args.eps));
    args.mean[row] = mean;
    args.scale[row] = scale;

    O* __restrict__ out = args.out + row * n;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = store<O>((load(x[i]) - mean) * scale * load(args.weight[i]) + load(args.bias[i]));
    }
  }
}

// With u = (sum - mean) * scale and g = grad * weight:
//   dx = sum_grad + scale * (g - mean(g) - u * mean(g u))
template <class S, class U, class O>
NTKCL_INLINE void backward_rows(const ResidualLayerNormBackward<S, U, O>& args, int64_t first,
                                int64_t last) {
  using C = Compute<S>;
  const int64_t n = args.width;
  for (int64_t row = first; row < last; ++row) {
    const O* __restrict__ grad = args.grad + row * n;
    const S* __restrict__ sum = args.sum + row * n;
    const S* __restrict__ weight = args.weight;
    const C mean = args.mean[row], scale = args.scale[row];
    const C mean_g =
        sum_loop<C>(
            n, [&](int64_t i) NTKCL_INLINE_LAMBDA { return load(grad[i]) * load(weight[i]); }) /
        n;
    const C mean_gu =
        sum_loop<C>(n,
                    [&](int64_t i) NTKCL_INLINE_LAMBDA {
                      return load(grad[i]) * load(weight[i]) * ((load(sum[i]) - mean) * scale);
                    }) /
        n;

    const S* __restrict__ sum_grad = args.sum_grad ? args.sum_grad + row * n : nullptr;
    S* __restrict__ dx = args.dx + row * n;
    for (int64_t i = 0; i < n; ++i) {
      const C u = (load(sum[i]) - mean) * scale;
      const C through = scale * (load(grad[i]) * load(weight[i]) - mean_g - u * mean_gu);
      dx[i] = store<S>(sum_grad ? load(sum_grad[i]) + through : through);
    }
    if (args.dupdate) {
      U* __restrict__ dupdate = args.dupdate + row * n;
      for (int64_t i = 0; i < n; ++i) {
        dupdate[i] = store<U>(load(dx[i]));
      }
    }
  }
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(S, U, O)                                                                      \
  NTKCL_MULTIVERSION void forward(const ResidualLayerNorm<S, U, O>& args, int64_t first,          \
                                  int64_t last) {                                                 \
    forward_rows(args, first, last);                                                              \
  }                                                                                               \
  NTKCL_MULTIVERSION void backward(const ResidualLayerNormBackward<S, U, O>& args, int64_t first, \
                                   int64_t last) {                                                \
    backward_rows(args, first, last);                                                             \
  }
NTKCL_FOR_LAYER_NORM_TYPES(NTKCL_LOOPS)
#undef NTKCL_LOOPS

}  // namespace

template <class S, class U, class O>
void residual_layer_norm_cpu(const ResidualLayerNorm<S, U, O>& args, int64_t first, int64_t last) {
  forward(args, first, last);
}

template <class S, class U, class O>
void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<S, U, O>& args, int64_t first,
                                      int64_t last) {
  backward(args, first, last);
}

#define NTKCL_INSTANTIATE(S, U, O)                                                            \
  template void residual_layer_norm_cpu(const ResidualLayerNorm<S, U, O>&, int64_t, int64_t); \
  template void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<S, U, O>&,   \
                                                 int64_t, int64_t);
NTKCL_FOR_LAYER_NORM_TYPES(NTKCL_INSTANTIATE)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
